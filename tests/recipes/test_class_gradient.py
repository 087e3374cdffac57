import pytest
import torch

from recipes.class_gradient import coverage
from recipes.lab.results import read_measurement


def test_coverage_is_measured_along_training(tmp_path, capsys):
    options = "--dataset digits --images 200 --seeds 2 --epochs 2 --batch_size 50 --lr 0.3 --output"
    coverage.main([*options.split(), str(tmp_path)])
    record = read_measurement(tmp_path / "coverage.jsonl")
    settings = {"dataset": "digits", "images": 200, "seeds": 2, "epochs": 2, "lr": 0.3, "batch_size": 50}
    assert record["settings"] == settings
    runs = record["runs"]
    assert [[point["epoch"] for point in points] for points in runs] == [[0, 1, 2]] * 2
    for point in (point for points in runs for point in points):
        assert all(0 <= point[key] <= 1 + 1e-6 for key in coverage.CURVES)
        assert point["eigenvalues"] == sorted(point["eigenvalues"], reverse=True)
        assert all(len(point[key]) <= 10 for key in coverage.RATIOS)
    start = runs[0][0]
    assert sum(start["ratios_of_all"]) > 5 * sum(start["ratios"])
    printed = capsys.readouterr().out
    assert "| 2 |" in printed
    (tmp_path / "plots" / "coverage.png").unlink()
    coverage.main(["--report", "--output", str(tmp_path)])
    assert printed.endswith(capsys.readouterr().out)
    assert (tmp_path / "plots" / "coverage.png").stat().st_size > 10_000


def test_the_low_rank_hessian_has_the_eigenpairs_of_its_sum():
    c, weight = torch.randn(4, 30, dtype=torch.float64), torch.tensor([0.2, 0.1, 0.0, 0.3], dtype=torch.float64)
    values, U = coverage.low_rank(c, weight)
    H = sum(w * torch.outer(v, v) for w, v in zip(weight, c, strict=True))
    assert len(values) == 3
    torch.testing.assert_close(H @ U, U * values)
    assert values.sum().item() == pytest.approx(H.trace().item())
