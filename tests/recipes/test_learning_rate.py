"""The sweep of learning rates, tiny: what it keeps, and what it prints of it."""

import json

from recipes.learning_rate import sweep


GRID = [("head", 0.0, 0), ("full", 1e-2, 0), ("subspace", 1e-2, 64)]


def test_every_run_is_made_once_and_kept(tmp_path, monkeypatch, capsys):
    def run(seed: str) -> list[dict]:
        arguments = ["--network", "lenet", "--lr", "1e-2", "--d", "64", "--seed", seed, "--epochs", "1"]
        sweep.main([*arguments, "--output", str(tmp_path)])
        record = json.loads((tmp_path / "results" / "sweep_1_epochs.json").read_text())
        assert record["epochs"] == 1
        return record["runs"]

    monkeypatch.setattr(sweep, "PRETRAINING", 1)
    runs = run("0")
    assert [(run["method"], run["lr"], run["d"]) for run in runs] == GRID
    assert all(0 < run["accuracy"] <= 100 for run in runs)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| lenet | subspace | 64 "))
    assert row == f"| lenet | subspace | 64 |  | {runs[2]['accuracy']:.1f} | 0.01 to 0.01 |"
    assert (tmp_path / "plots" / "sweep_1_epochs.png").exists()

    trained = []
    monkeypatch.setattr(sweep, "fine_tune", lambda *run: trained.append(run[1:]) or 50.0)
    assert run("0") == runs
    assert not trained
    assert run("1")[:3] == runs
    assert trained == [(1, "lenet", *run, 1) for run in GRID]
