"""The sweep of learning rates: tiny runs, and the committed results, which the page about learning rates shows."""

import json
from pathlib import Path

import pytest

from recipes import run
from recipes.lab.grid import read
from recipes.lab.results import Results, read_lines
from recipes.learning_rate import sweep
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
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| lenet | subspace | 64 "))
    assert f"| {first[2]['accuracy']:.1f} |" in row
    assert (tiny.parent / "plots" / "tiny.png").exists()

    trained = []
    monkeypatch.setattr(sweep, "fine_tune", lambda *run: trained.append(run[1:]) or (50.0, [0.01, 0.01]))
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"network": "resnet"}, "`network` must be one of lenet, vit, got 'resnet'"),
        ({"method": "lora"}, "`method` must be one of head, full, subspace, found, got 'lora'"),
        ({"d": 0}, "`d` of method 'subspace' must be at least 1, got 0"),
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


@pytest.mark.parametrize(("name", "count"), [("sweep", 210), ("sweep_80_epochs", 42)])
def test_every_run_has_a_committed_result(name, count):
    runs, lines = read(FOLDER / f"{name}.yaml").runs, dict(read_lines(FOLDER / f"{name}.jsonl"))
    assert len(lines) == count
    assert {run.name: run.record() for run in runs} == {key: line["settings"] for key, line in lines.items()}
    for line in lines.values():
        found = {"found_lr"} if line["settings"]["method"] == "found" else set()
        assert set(line) == {"settings", "accuracy", "batch", "head_lr", "versions", "hardware", "commit"} | found
        assert line["batch"] == 16
        assert found or line["head_lr"] == 0.01


@pytest.mark.parametrize(
    ("name", "heading"), [("sweep", "## The sweep"), ("sweep_80_epochs", "## Ten times the steps")]
)
def test_the_page_shows_the_committed_results(name, heading):
    page = (ROOT / "docs" / "learning_rate.md").read_text(encoding="utf-8").split(heading)[1].split("\n## ")[0]
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "|" in line
    )
    recipe = read(FOLDER / f"{name}.yaml")
    means = sweep.table(sweep.records(recipe.runs, Results(FOLDER)))
    assert len(rows) == 10
    for network, trained, *cells in rows:
        method, d = ("full", 0) if trained == "full" else ("subspace", int(trained.removeprefix("d = ")))
        for rate, cell in zip(header[2:-1], cells[:-1], strict=True):
            if rate == "found":
                assert cell == (f"{means.loc[(network, 'found', d), 0.0]:.1f}" if d else "")
            else:
                assert f"{means.loc[(network, method, d), float(rate)]:.1f}" == cell


def test_a_page_of_results_is_json_with_plain_types():
    for name in ("sweep", "sweep_80_epochs"):
        for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            settings = json.loads(line)["settings"]
            assert {key: type(value) for key, value in settings.items()} == sweep.TYPES
