"""`recipes/run.py --report`: it says again what the runs ended with."""

import pytest

from recipes.lab.grid import read
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
