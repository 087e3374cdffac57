"""Runs trained together give the results that they give alone."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from recipes import run
from recipes.lab.grid import read
from recipes.lab.results import Results, read_measurement
from recipes.speed import sweeps
from recipes.tasks.data import load
from recipes.tasks.models import MODELS
from recipes.training import kind
from recipes.training.settings import Settings
from recipes.training.together import Networks, alike, train_together
from recipes.training.train import origin, train, wrap
from subspace_peft.adapter.walk import find_vectors


DATA = load("digits", "", "train").first(640), load("digits", "", "test").first(100)
BASE = Settings(model="fc", projection="fastjl", d=20, projection_seed=7, epochs=2, lr=0.05, schedule="cosine")
DENSE = replace(BASE, projection="dense")
NESTED = [replace(DENSE, d=d, seed=seed) for d in (5, 50, 20) for seed in (0, 1)]
SEEDS = [0, 3]


def many(settings, **changes):
    return [replace(settings, seed=seed, **changes) for seed in SEEDS]


@pytest.mark.parametrize(
    "runs",
    [
        NESTED,
        many(BASE, measured=100, center=True, optimizer="adam_larsen"),
        many(BASE, optimizer="sgd", momentum=0.9, burn_in=4, augment=True, schedule="step", decay_epoch=1),
        many(BASE, model="conv2", projection="sparse", normalization="rows", optimizer="adamw", weight_decay=0.1),
        many(BASE, model="resnet20v1", images=64, batch_size=32, epochs=1),  # batch norm without statistics
    ],
    ids=["nested", "measured", "burn-in", "in turn", "batch norm"],
)
def test_results_are_those_of_the_plain_loop(runs):
    accuracies = []
    together = train_together(runs, Accelerator(cpu=True), *DATA, accuracies.append)
    assert len(accuracies) == sum(settings.epochs for settings in runs)
    for settings, one in zip(runs, together, strict=True):
        alone = train(settings, Accelerator(cpu=True), *DATA)
        assert one.keys() == alone.keys() | {"together"}
        assert (one["D"], one["d"], one["together"]) == (alone["D"], settings.d, len(runs))
        assert one["seconds"].keys() == alone["seconds"].keys()
        assert one["final_accuracy"] == pytest.approx(alone["final_accuracy"], abs=2 / 100)
        moments = [*zip(one["epochs"], alone["epochs"], strict=True)]
        if settings.measured:
            moments.append((one["origin"], alone["origin"]))
        for mine, theirs in moments:
            assert mine.keys() == theirs.keys()
            assert mine["test_accuracy"] == pytest.approx(theirs["test_accuracy"], abs=2 / 100)
            for loss in {"train_loss", "loss"} & mine.keys():
                assert mine[loss] == pytest.approx(theirs[loss], rel=1e-3)


@pytest.mark.parametrize("model", ["fc", "conv2", "untied_lenet"])
@pytest.mark.parametrize("side_by_side", [True, False])
def test_gradients_are_those_of_the_wrapped_network(model, side_by_side):
    """Whatever the network, a run's own columns alone move it, and a run that diverges leaves the others alone."""
    runs = [replace(DENSE, model=model, d=d, seed=seed, burn_in=1) for d, seed in ((4, 0), (9, 1), (9, 2))]
    networks = Networks(runs, DATA[0], torch.device("cpu"))
    networks.side_by_side = side_by_side
    networks.theta_d.data = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    networks.theta_d.data[2] = torch.nan
    index = torch.arange(60).view(3, 20)
    losses, logits = networks.backward(*DATA[0].batch(index)), networks.predict(DATA[1])
    for r, settings in enumerate(runs[:2]):
        wrapped = wrap(origin(settings, DATA[0], None, "cpu"), settings)
        theta_d = find_vectors(wrapped).subspace_peft_theta_d["default"]
        theta_d.data = networks.theta_d[r, : settings.d].clone()
        images, labels = DATA[0].batch(index[r])
        loss = cross_entropy(wrapped(images), labels)
        loss.backward()
        torch.testing.assert_close(losses[r], loss.detach())
        torch.testing.assert_close(networks.theta_d.grad[r, : settings.d], theta_d.grad, rtol=1e-4, atol=1e-5)
        assert not networks.theta_d.grad[r, settings.d :].any()
        torch.testing.assert_close(logits[r], wrapped(DATA[1].batch(torch.arange(100))[0]).detach())


def test_what_is_trained_together_differs_in_seed_or_nested_d_alone():
    assert alike(BASE) == alike(replace(BASE, seed=1)) is not None
    assert alike(BASE) != alike(replace(BASE, d=21))
    assert alike(DENSE) == alike(replace(DENSE, d=21))
    assert alike(replace(DENSE, normalization="rows")) != alike(replace(DENSE, normalization="rows", d=21))
    for key, value in {"lr": 0.1, "epochs": 3, "burn_in": 2, "projection_seed": 8, "model": "lenet"}.items():
        assert alike(replace(DENSE, **{key: value})) not in (alike(DENSE), None)
    with pytest.raises(ValueError, match="differ in `seed`"):
        train_together([BASE, replace(BASE, lr=0.1)], Accelerator(cpu=True), *DATA)


@pytest.mark.parametrize(
    "change",
    [{"projection_seed": -1}, {"projection": "full"}, {"projection": "coordinate", "pruned": True}]
    + [{"projection": "identity"}, {"optimizer": "pbfgs"}, {"save_adapter": True}, {"model": "resnet20"}],
    ids=str,
)
def test_others_are_trained_alone(change):
    assert alike(replace(BASE, **change)) is None


def test_runs_have_one_p_where_it_has_a_seed_of_its_own():
    def move(settings):
        wrapped = copy.deepcopy(wrap(origin(settings, DATA[0], None, "cpu"), settings))
        find_vectors(wrapped).subspace_peft_theta_d["default"].data.fill_(1.0)
        return wrapped.base_model.model[1].get_delta_weight("default")

    shared, own = many(BASE), many(BASE, projection_seed=-1)
    assert torch.equal(*map(move, shared))
    assert not torch.equal(*map(move, own))
    assert torch.equal(move(own[0]), move(replace(own[0], projection_seed=0)))


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(
        "model: fc\nimages: 256\nepochs: 1\nlr: 0.1\nprojection: [full, dense]\nd: [3, 4]\nthreads: 1\nseed: [0, 1]\n"
        "projection_seed: 0\ntogether: 3\n"
    )
    return file


def results(file):
    return {path.stem: json.loads(path.read_text()) for path in (file.parent / "results").glob("*.json")}


def test_a_sweep_trains_together_what_is_alike_and_free(recipe):
    """Here four runs, by three; one is with another process, and done when that is gone."""
    dense = [settings for settings in read(recipe).runs if settings.projection == "dense"]
    held = Results(recipe.parent)
    assert held.take(dense[1])
    owner = held.folder / f"{dense[1].name}.lock" / "owner"
    owner.write_text("another-machine 1")
    run.main([str(recipe)])
    before = results(recipe)
    assert before.keys() == {settings.name for settings in read(recipe).runs} - {dense[1].name}
    assert sorted(result.get("together", 1) for result in before.values()) == [1, 1, 3, 3, 3]
    assert sorted(result["d"] for result in before.values() if "together" in result) == [3, 3, 4]
    held.release(dense[1])
    run.main([str(recipe)])
    after = results(recipe)
    assert {name: after[name] for name in before} == before
    assert "together" not in after[dense[1].name]
    assert not list(held.folder.glob("*.lock"))


def test_a_stopped_group_leaves_nothing_behind(recipe, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, "train_together", stop)
    with pytest.raises(KeyboardInterrupt):
        run.main([str(recipe), "--projection", "dense"])
    assert not (recipe.parent / "results").exists()


def test_how_many_are_trained_together_is_not_in_the_name():
    assert replace(BASE, together=5).name == BASE.name != replace(BASE, projection_seed=-1).name
    assert replace(BASE, projection="full").name == Settings(model="fc", epochs=2, lr=0.05, schedule="cosine").name


def test_the_measurement_of_sweeps_runs_tiny(tmp_path, capsys):
    cases = ["fc digits dense", "lenet mnist fastjl"]
    sweeps.main(["--rounds", "1", "--runs", "2", "--cases", *cases, "--whole", "--output", str(tmp_path)])
    record = read_measurement(tmp_path / "sweeps.jsonl")
    assert [[way["gain"] > 0 for way in case[0]["step"].values()] for case in record["cases"].values()] == [
        [True] * 3
    ] * 2
    header, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert "| together: 2 |" in header
    assert [row.split(" | ")[:2] for row in rows] == [["| fc, digits", "dense"], ["| lenet, mnist", "fastjl"]]
    assert set(MODELS) >= {case.split()[0] for case in cases}
