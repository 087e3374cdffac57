"""The scripts of recipes/theory, small, and what their results must show."""

import numpy as np
import pytest
import torch
from scipy.stats import beta

from recipes.lab.results import read_measurement
from recipes.theory import affine, dimensions, linearized, wells
from recipes.theory.wells import SPECTRA


def test_spectra_are_from_long_to_short():
    for spectrum in SPECTRA.values():
        eigenvalues = spectrum(40)
        assert eigenvalues.shape == (40,)
        assert (eigenvalues.min().item(), eigenvalues.max().item()) == pytest.approx((1e-3, 1))
    assert (SPECTRA["bimodal"](40) == 1).sum() == 20


def test_wells(tmp_path, capsys):
    wells.main(["--D", "60", "--runs", "6", "--output", str(tmp_path)])
    table = capsys.readouterr().out
    assert table.count("| bimodal |") == 12
    record = read_measurement(tmp_path / "wells.jsonl")
    assert record["d"] == list(range(61))
    epsilon = torch.logspace(-4, -1, 5).double()
    for name in SPECTRA:
        near, far = (wells.thresholds(record, name, R, epsilon) for R in (0.5, 2.0))
        for kind in near:
            assert (near[kind] <= far[kind]).all()
            assert (near[kind].diff() <= 0).all()
        assert (far["limit"] <= far["bound"]).all()
        assert (far["simulated"] - far["limit"]).abs().max() < 12
    wells.main(["--report", "--output", str(tmp_path)])
    assert capsys.readouterr().out == table
    assert (tmp_path / "plots" / "wells.png").stat().st_size > 10_000


def test_dimensions(tmp_path, capsys):
    dimensions.main(["--D", "60", "--draws", "100", "--runs", "20", "--output", str(tmp_path)])
    assert "| one axis |" in capsys.readouterr().out
    record = read_measurement(tmp_path / "dimensions.jsonl")
    for row in record["widths"]:
        assert row["low"] - 4 * row["error"] < row["square"] < row["high"] + 4 * row["error"]
    for row in record["angles"]:
        median = torch.tensor(row["needed"]).double().median().item()
        assert median == pytest.approx(60 - row["local"], abs=4)
    assert (tmp_path / "plots" / "gordon.png").stat().st_size > 10_000


def test_affine_subspaces_meet_from_their_threshold_on(tmp_path, capsys):
    affine.main(["--D", "40", "--runs", "20", "--output", str(tmp_path)])
    assert "| 20 | 20 | 20 | 100 % | 0 | 0.0000 |" in capsys.readouterr().out
    for row in read_measurement(tmp_path / "affine.jsonl")["rows"]:
        assert row["meets"] == (row["d"] >= 40 - row["n"])
        left = 40 - row["n"] - row["d"]
        spread = beta(left / 2, (40 - left) / 2).std() / 20**0.5 if left > 0 else 0  # of the mean square over 20 runs
        assert row["distance"] ** 2 == pytest.approx(row["formula"] ** 2, abs=4 * spread + 1e-18)


def test_linearized_networks_and_what_is_left_of_a_sweep(tmp_path, capsys):
    common = "--dataset digits --images 512 --test_images 100 --epochs 4 --optimum_epochs 4 --seed 0"
    arguments = [*common.split(), "--output", str(tmp_path)]
    linearized.main([*arguments, "--d", "8"])
    file = tmp_path / "linearized.jsonl"
    record = read_measurement(file)
    assert {"versions", "hardware", "commit"} <= set(record)
    digits = record["datasets"]["digits"]
    assert digits["D"] == 6090
    cut = digits["cut"]
    column, row = (np.abs(np.array(cut[axis]) - at).argmin() for axis, at in zip("xy", cut["points"][1], strict=True))
    assert cut["full"][row][column] == pytest.approx(cut["linearized"][row][column], abs=0.1)  # the same, at w*
    linearized.main([*arguments, "--d", "8", "512"])
    runs = read_measurement(file)["runs"]
    assert runs[:2] == record["runs"]
    assert [(run["network"], run["d"]) for run in runs[2:]] == [("full", 512), ("linearized", 512)]
    assert all(run["accuracy"] > 0.3 for run in runs[2:])
    capsys.readouterr()
    linearized.main([*arguments, "--report"])
    assert "| digits | linearized |" in capsys.readouterr().out
    assert (tmp_path / "plots" / "linearized.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="holds runs of .* give another `--output`"):
        linearized.main([*arguments, "--model", "cnn"])
