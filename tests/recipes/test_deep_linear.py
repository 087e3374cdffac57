"""The scripts of recipes/deep_linear, small: what the theorem says, what a compressed network is, and resuming."""

import dataclasses
from itertools import pairwise

import pytest
import torch
import yaml

from recipes import run as command
from recipes.deep_linear import collapse, completion, dynamics
from recipes.deep_linear.networks import compressed, descend, product, start
from recipes.lab.grid import read
from recipes.lab.results import Results, digits
from recipes.lab.settings import PlainSettings
from tests.recipes.files import RECIPES, options, results


FOLDER = RECIPES / "deep_linear"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def first(name: str) -> dict:
    """The settings of the first run of a YAML."""
    return read(FOLDER / f"{name}.yaml").runs[0]


@pytest.mark.parametrize("kind", ["orthogonal", "normal", "uniform"])
def test_starts(kind):
    for w, (m, n) in zip(start([40, 40, 30, 50], kind, 0.1, generator()), [(40, 40), (30, 40), (50, 30)], strict=True):
        assert w.shape == (m, n)
        k = min(m, n)
        assert w.norm().item() == pytest.approx(0.1 * k**0.5, rel=1e-12 if kind == "orthogonal" else 0.1)
        if kind == "orthogonal":
            gram = w @ w.mT if m <= n else w.mT @ w
            torch.testing.assert_close(gram, 0.01 * torch.eye(k, dtype=torch.float64))
    with pytest.raises(ValueError, match="`start` must be one of orthogonal, normal, uniform, got 'xavier'"):
        start([2, 2], "xavier", 1.0, generator())


@pytest.mark.parametrize("widths", [[5, 3, 4], [4, 3, 5], [4, 4, 4], [6, 2, 2, 1]])
def test_a_product_is_the_product(widths):
    weights = [normal(m, n, seed=m) for n, m in pairwise(widths)]
    expected = torch.linalg.multi_dot(weights[::-1])
    torch.testing.assert_close(product(weights), expected)


def test_descent_is_that_of_torch():
    weights, target = start([6, 6, 6], "normal", 1.0, generator()), normal(6, 6)
    copies = [w.clone().requires_grad_() for w in weights]
    optimizer = torch.optim.SGD(copies, lr=0.01, momentum=0.9, weight_decay=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        ((product(copies) - target).square().sum() / 2).backward()
        optimizer.step()
    seen = []
    descend(
        weights, lambda w: (product(w) - target).square().sum() / 2, 0.01, 20, 8, lambda *at: seen.append(at[0]),
        momentum=0.9, weight_decay=0.1,
    )  # fmt: skip
    assert seen == [0, 8, 16, 20]
    for w, copy in zip(weights, copies, strict=True):
        torch.testing.assert_close(w, copy.detach())
    with pytest.raises(ValueError, match="must stay finite, it is (inf|nan) at iteration .*; lower `lr`"):
        descend(weights, lambda w: product(w).square().sum(), 1e9, 50, 1)


def test_a_compressed_network_learns_what_the_whole_one_does():
    """Inside the invariant subspace the two are one trajectory, and outside it rho^L is all there is."""
    d, r, L, eps = 12, 2, 3, 0.1
    Phi = normal(d, r) @ normal(r, d, seed=1) / 4
    whole = start([d] * (L + 1), "orthogonal", eps, generator(2))
    small, loss = compressed(whole, Phi, r, eps), lambda w: (product(w) - Phi).square().sum() / 2
    assert [tuple(w.shape) for w in small] == [(4, 12), (4, 4), (4, 4), (4, 4), (12, 4)]
    descend(whole, loss, 0.05, 300)
    descend(small, loss, 0.05, 300, rates=[0.0, 1.0, 1.0, 1.0, 0.0])
    rho = eps
    for _ in range(300):
        rho -= 0.05 * rho**5
    apart = torch.linalg.svdvals(product(whole) - product(small))
    torch.testing.assert_close(apart[: d - 2 * r], torch.full((d - 2 * r,), rho**L, dtype=torch.float64))
    assert apart[d - 2 * r :].max() < 1e-12
    assert (product(small) - Phi).norm() < 0.1 * Phi.norm()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"depth": 4},
        {"weight_decay": 1.0},
        {"momentum": 0.9, "lr": 0.0003},
        {"case": 2},
        {"case": 2, "weight_decay": 1.0},
    ],
    ids=str,
)
def test_the_law_of_parsimony(changes):
    run = dynamics.measure(first("dynamics") | {"d": 12, "rank": 2, "lr": 0.003, "iterations": 100} | changes)
    assert run["loss"][-1] < 0.5 * run["loss"][0]
    assert max(run["deviation"]) < 1e-13
    assert max(run["values"]) < 1e-13
    assert max(each for layer in run["layers"].values() for each in (layer["middle"]["left"] or [0]) if each) < 1e-10
    assert (run["rho"][-1] < run["rho"][0]) == (changes.get("case") != 2 or "weight_decay" in changes)


def test_the_law_needs_whitened_data():
    run = dynamics.measure(first("dynamics") | {"d": 12, "rank": 2, "case": 2, "whitened": False, "iterations": 100})
    assert max(run["deviation"]) > 1e-3


def test_dynamics_and_resuming(tmp_path, capsys, monkeypatch):
    tiny = {"d": 8, "rank": 2, "iterations": 20, "lr": 0.002}
    arguments = [str(FOLDER / "dynamics.yaml"), *options(tiny, tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(dynamics, "plot", lambda runs, results, file: file)
        command.main(arguments)
        table, made = capsys.readouterr().out, results(tmp_path)
        assert made.keys() == {run.name for run in read(FOLDER / "dynamics.yaml", tiny).runs}
        assert all({"settings", "versions", "hardware", "commit"} <= result.keys() for result in made.values())
        name = sorted(made)[3]
        (tmp_path / "results" / f"{name}.json").unlink()
        again = []
        measure = dynamics.measure
        kind = dataclasses.replace(
            dynamics.KIND, make=lambda runs, *rest: [again.append(run.name) or measure(run) for run in runs]
        )
        patch.setattr(dynamics, "KIND", kind)
        command.main(arguments)
    assert again == [name]
    assert capsys.readouterr().out.splitlines()[:-1] == table.splitlines()[:-1]
    command.main([*arguments, "--report"])
    assert (tmp_path / "plots" / "dynamics.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["factorisation", "completion"])
def test_completion(name, tmp_path, capsys):
    tiny = {"d": 24, "rank": 1, "estimate": 1, "eps": 0.05, "iterations": 1500, "seed": 0}
    tiny |= {"lr": 0.8, "seen": 0.5} if name == "completion" else {"lr": 0.4, "seen": 1.0}
    file = FOLDER / f"{name}.yaml"
    command.main([str(file), *options(tiny, tmp_path)])
    assert "| compressed, 2r̂ = 2" in capsys.readouterr().out
    runs = Results(tmp_path).records(read(file, tiny).runs)
    whole, small = (next(r for r in runs if r["settings"]["network"] == kind) for kind in ("whole", "compressed"))
    assert whole["error"] < 0.1
    assert small["parameters"] < whole["parameters"]
    assert completion.reached(whole, 0.5)[0] > 0
    assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 10_000


def test_depth(tmp_path, capsys):
    tiny = {"d": 16, "rank": 1, "eps": 0.05, "iterations": 600, "seed": 0}
    arguments = [str(FOLDER / "depth.yaml"), *options(tiny, tmp_path)]
    command.main([*arguments, "--width", "4", "16", "--seen", "0.5", "0.8"])
    assert capsys.readouterr().out.count("| 3 | 16 |") == 2
    assert (tmp_path / "plots" / "depth.png").stat().st_size > 10_000


def test_collapse(tmp_path, capsys):
    tiny = {"K": 3, "n": 4, "d": 12, "seed": 0, "iterations": 300}
    command.main([str(FOLDER / "collapse.yaml"), *options(tiny, tmp_path), "--depth", "4", "5"])
    assert "| 5 | relu |" in capsys.readouterr().out
    run = collapse.measure(first("collapse") | {"K": 3, "n": 4, "d": 20, "depth": 4, "eps": 0.2, "iterations": 3000})
    ratio, r2 = collapse.fit(run)
    assert ratio == pytest.approx(0.2**2 / 4 ** (1 / 4), rel=0.05)
    assert r2 > 0.999
    assert run["S"][0] == pytest.approx(0.5, abs=0.02)  # a simplex of three
    assert (tmp_path / "plots" / "collapse.png").stat().st_size > 10_000


def test_every_yaml_has_runs_of_its_settings():
    for file in FOLDER.glob("*.yaml"):
        runs = read(file).runs
        assert runs
        assert runs[0].keys() >= yaml.safe_load(file.read_text()).keys() - {"runs", "kind", "report"}


def test_numbers_of_a_few_digits():
    assert digits([1.23456, float("nan")], 2) == [1.2, None]
    assert digits(torch.tensor([[1.23456]]), 3) == [[1.23]]


def test_settings_are_named_by_all_of_them():
    assert PlainSettings(a=1, _data="here").name == PlainSettings(a=1).name != PlainSettings(a=2).name
