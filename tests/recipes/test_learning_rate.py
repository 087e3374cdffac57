"""The sweep of learning rates: tiny runs, and the committed results."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from recipes import run
from recipes.lab.grid import read
from recipes.lab.results import read_lines
from recipes.learning_rate import sweep
from recipes.tasks.data import Split
from tests.recipes.files import results, written


ROOT = Path(run.__file__).parents[1]
FOLDER = ROOT / "recipes" / "learning_rate"
GRID = [("head", 0.0, 0), ("full", 1e-2, 0), ("subspace", 1e-2, 64), ("found", 0.0, 64)]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "PRETRAINING", 1)
    sweep.pretrained.cache_clear()
    yield written(
        tmp_path / "tiny.yaml",
        *("kind: learning_rate.sweep", "network: lenet", "epochs: 1", "seed: [0, 1]", "runs:"),
        "  - {method: head, lr: 0.0, d: 0}",
        "  - {method: full, lr: [1.0e-3, 1.0e-2], d: 0}",
        "  - {method: subspace, lr: [1.0e-3, 1.0e-2], d: [64, 256]}",
        "  - {method: found, lr: 0.0, d: [64, 256]}",
    )
    sweep.pretrained.cache_clear()


def test_every_run_is_made_once_and_kept(tiny, monkeypatch, capsys):
    def made(*choices: str) -> list[dict]:
        run.main([str(tiny), "--lr", "1e-2", "--d", "64", *choices])
        order = [*GRID]
        kept = [result for result in results(tiny.parent).values() if result["settings"]["epochs"] == 1]
        assert all({"versions", "hardware", "commit"} <= set(result) for result in kept)
        return sorted(kept, key=lambda r: (r["settings"]["seed"], order.index(place(r))))

    def place(result: dict) -> tuple:
        return tuple(result["settings"][key] for key in ("method", "lr", "d"))

    first = made("--seed", "0")
    assert [place(result) for result in first] == GRID
    assert all(0 < result["accuracy"] <= 100 for result in first)
    assert all((result["batch"], result["head_lr"]) == (16, 0.01) for result in first[:3])
    assert 1e-3 < first[3]["found_lr"] < first[3]["head_lr"]
    said, (_, _, grid, found) = capsys.readouterr().out, (result["accuracy"] for result in first)
    assert re.search(rf"\| lenet \| fastfood, d = 64 \| \**{found:.1f}\** \| \**{grid:.1f}\** \|", said)
    near = f"Within 1 point of the best in {int(found >= grid - 1)} of 1 rows, within 3 in {int(found >= grid - 3)};"
    assert f"{near} {found - grid:+.1f} on average." in said
    assert (tiny.parent / "plots" / "tiny.png").exists()

    trained = []
    monkeypatch.setattr(sweep, "train", lambda model, data, *run: trained.append(run) or (model, [0.01, 0.01]))
    assert made("--seed", "0") == first
    assert not trained
    assert made()[: len(GRID)] == first
    assert trained == [(1, "lenet", *each, 1) for each in GRID]


def test_baselines_stay_where_rates_and_dimensions_are_chosen(tiny):
    chosen = read(tiny, {"d": ["32"], "lr": ["1e-2", "0.1"], "seed": ["0"]}).runs
    assert {(r["method"], r["lr"], r["d"]) for r in chosen} == {
        *(("head", 0.0, 0), ("full", 0.01, 0), ("full", 0.1, 0)),
        *(("subspace", 0.01, 32), ("subspace", 0.1, 32), ("found", 0.0, 32)),
    }
    (name,) = (r.name for r in read(tiny, {"method": ["head"], "seed": ["0"], "lr": ["0"]}).runs)
    assert name in {r.name for r in read(tiny).runs}


def test_a_network_that_is_trained_for_several_numbers_of_epochs_is_several():
    runs = [
        *(("subspace", 0.1, 3, 90.0), ("found", 0.0, 3, 91.5)),
        *(("subspace", 0.1, 80, 98.0), ("subspace", 0.3, 80, 97.0), ("found", 0.0, 80, 1.0)),
    ]
    kept = [
        {"settings": dict(zip(sweep.TYPES, ("lenet", method, lr, 64, 0, epochs), strict=True)), "accuracy": accuracy}
        for method, lr, epochs, accuracy in runs
    ]
    tables = sweep.parts([], SimpleNamespace(records=lambda runs: kept))
    assert "| lenet, 3 epochs | fastfood, d = 64 | 0.1 | 90.0 | 91.5 | +1.5 |" in tables["found"]
    assert "| lenet, 80 epochs | fastfood, d = 64 | 1.0 | **98.0** | 97.0 |" in tables["rates"]
    assert "Within 1 point of the best in 1 of 2 rows, within 3 in 1" in tables["found"]


@pytest.mark.parametrize(("method", "lr"), [("full", 1e-3), ("kronecker", 1e-2), ("found kronecker", 0.0)])
def test_a_network_without_a_new_head_is_drawn_from_the_seed(method, lr, monkeypatch):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (128, 1, 28, 28), generator=random, dtype=torch.uint8)
    split, started = Split(images, torch.arange(128) % 10), []
    monkeypatch.setattr(sweep, "mnist", lambda source: started.append(source) or (split, split))
    run = {"network": "fc_mnist", "method": method, "lr": lr, "d": 8 * (method != "full"), "epochs": 1}
    results = [sweep.measure(sweep.settings(run | {"seed": seed, "_data": "folder"})) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]
    assert started == ["folder"] * 3
    assert set(results[0]) == {"accuracy", "batch"} | ({"found_lr"} if not lr else set())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"network": "resnet"}, "`network` must be one of lenet, vit, fc_mnist, lenet_mnist, got 'resnet'"),
        (
            {"method": "lora"},
            "`method` must be one of head, full, subspace, kronecker, low rank, found, found kronecker, "
            "found low rank, got 'lora'",
        ),
        ({"d": 0}, "`d` of method 'subspace' must be at least 1, got 0"),
        ({"d": 0, "method": "found low rank"}, "`d` of method 'found low rank' must be at least 1, got 0"),
        ({"network": "fc_mnist", "method": "head"}, "`method` must not be 'head' for network 'fc_mnist'"),
        ({"epochs": 0}, "`epochs` of method 'subspace' must be at least 1, got 0"),
        ({"lr": 0}, "`lr` of method 'subspace' must be above 0, got 0.0"),
        ({"seed": 1.5}, "`seed` must be of type int, got 1.5"),
        ({"seed": None}, "A run must have the settings network, .*; give seed"),
    ],
)
def test_runs_that_cannot_be_are_refused(values, message):
    run = {"network": "vit", "method": "subspace", "lr": 1e-3, "d": 64, "seed": 0, "epochs": 8} | values
    with pytest.raises(ValueError, match=message):
        sweep.settings({key: value for key, value in run.items() if value is not None})


@pytest.mark.parametrize(("name", "count"), [("sweep", 1096), ("sweep_steps", 462)])
def test_every_run_has_a_committed_result(name, count):
    runs, lines = read(FOLDER / f"{name}.yaml").runs, dict(read_lines(FOLDER / f"{name}.jsonl"))
    assert len(lines) == count
    assert {run.name: run.record() for run in runs} == {key: line["settings"] for key, line in lines.items()}
    for line in lines.values():
        network = sweep.NETWORKS[line["settings"]["network"]]
        found = {"found_lr"} if line["settings"]["method"].startswith("found") else set()
        rates = found | ({"head_lr"} if network.head else set())
        assert set(line) == {"settings", "accuracy", "batch", "versions", "hardware", "commit"} | rates
        assert line["batch"] == network.batch
        assert found or not network.head or line["head_lr"] == 0.01


def test_a_page_of_results_is_json_with_plain_types():
    for name in ("sweep", "sweep_steps"):
        for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            settings = json.loads(line)["settings"]
            assert {key: type(value) for key, value in settings.items()} == sweep.TYPES
