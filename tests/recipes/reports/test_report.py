"""The report of a recipe, by its name in the YAML."""

import pytest

from recipes.lab.grid import REPORTS
from recipes.reports import report
from recipes.run import main


TINY = "dataset: digits\nmodel: fc\nimages: 200\nepochs: 1\nbatch_size: 100\nruns:\n  - {projection: full}\n"


def test_every_name_has_a_report():
    assert {"dimension", *report.REPORTS} == set(REPORTS)


@pytest.mark.parametrize("name", ["dimension", "methods"])
def test_it_says_again_what_the_sweep_ended_with(name, tmp_path, capsys):
    file = tmp_path / "tiny.yaml"
    file.write_text(f"report: {name}\n" + TINY + "  - {projection: fastjl, d: [5, 9]}\n")
    with pytest.raises(SystemExit, match=r"No run of .*tiny.yaml has a result in .* yet; recipes/run.py makes them"):
        report.main([str(file)])
    main([str(file)])
    before = capsys.readouterr().out
    figure = tmp_path / "plots" / "tiny.png"
    figure.unlink()
    report.main([str(file)])
    assert figure.exists()
    assert capsys.readouterr().out in before
