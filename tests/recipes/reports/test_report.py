"""`recipes/run.py --report`: it says again what the runs ended with; what the report of pretrained models computes."""

import pandas as pd
import pytest

from recipes.lab.grid import read
from recipes.pretrained.report import _pairs, differences, shares
from recipes.run import main
from tests.recipes.files import RECIPE_FILES, written


TINY = ["dataset: digits", "model: fc", "images: 200", "epochs: 1", "batch_size: 100", "runs:"]


@pytest.mark.parametrize("name", ["dimension", "optimisers", "compression", "phases", "low_rank"])
def test_it_says_again_what_the_runs_ended_with(name, tmp_path, capsys):
    part = "{projection: identity, rank: [2, 3]}" if name == "low_rank" else "{projection: fastjl, d: [5, 9]}"
    file = written(tmp_path / "tiny.yaml", f"report: {name}", *TINY, "  - {projection: full}", f"  - {part}")
    with pytest.raises(ValueError, match=r"tiny\.yaml has none in .* yet"):
        main([str(file), "--report"])
    main([str(file)])
    before = capsys.readouterr().out
    figure = tmp_path / "plots" / "tiny.png"
    drawn = figure.read_bytes()
    figure.unlink()
    main([str(file), "--report"])
    assert figure.read_bytes() == drawn
    assert capsys.readouterr().out in before
    assert before.count("| --- |") >= 1


@pytest.mark.parametrize("file", RECIPE_FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_yaml_has_a_report(file):
    if "- timm/" in file.read_text():
        pytest.importorskip("timm")
    report = read(file).report
    assert callable(report.text)
    assert callable(report.plot)


def test_differences_are_paired_by_seed():
    accuracies = {("weight, kronecker", 0): 80, ("weight, kronecker", 1): 84, ("weight, kronecker", 2): 70}
    accuracies |= {("weight, fastjl", 0): 81, ("weight, fastjl", 1): 82}
    rows = [
        {
            "label": label,
            "seed": seed,
            "d": 64,
            "lr": 0.01,
            "head_lr": 0.1,
            "test": value,
            "validation": 50,
            "test_examples": 100,
        }
        | {"validation_examples": 100}
        for (label, seed), value in accuracies.items()
    ]
    rows += [row | {"d": 256, "test": row["test"] + row["seed"]} for row in rows]
    paired = differences(pd.DataFrame(rows))
    row = paired.set_index(["d", "split"]).loc[64, "test"]
    assert row.each == [-1, 2]
    assert (row["mean"], row.error) == pytest.approx((0.5, 1.5))
    assert "| all |  | test set | 82.25 | 81.75 | 0.50 ± 0.87 | 4 pairs |  |" in _pairs(paired)


def test_a_share_is_between_the_head_alone_and_full_fine_tuning():
    tests = {"full fine-tuning": 90, "head alone": 70, "weight, kronecker, rates found": 85, "LoRA": 99}
    rows = pd.DataFrame({"label": tests.keys(), "test": tests.values(), "lr": [1e-3, 1e-3, 0, 1e-3]})
    between = shares(rows)
    assert between.label.tolist() == ["head alone", "weight, kronecker, rates found", "full fine-tuning"]
    assert between.share.tolist() == [0, 0.75, 1]
