"""recipes/spectra, small: what its numbers are for increments known in closed form, and each YAML's run."""

import pytest
import torch
import yaml
from transformers import ViTConfig, ViTForImageClassification

from recipes import run as command
from recipes.lab.grid import read
from recipes.spectra.dynamics import dynamics
from tests.recipes.files import RECIPES, results


TINY = {"dataset": "digits", "images": 128, "epochs": 1, "batch_size": 32, "recorded": 3}
SHAPE = {
    "patch_size": 4,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}


def test_an_increment_inside_the_first_directions():
    """2K = 4 directions that grow where they are: nothing turns, all of it is in 2K and known from the first step."""
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n)))[0] for n in (12, 16))
    sigma = torch.arange(30.0, 6.0, -2.0)
    weights = {}
    for step in range(3):
        grown = sigma.clone()
        grown[:2] += 10.0 * step * torch.tensor([2.0, 1.0])
        grown[-2:] -= step * torch.tensor([1.0, 2.0])
        weights[step] = {"W": U * grown @ V[:, :12].mT}
    layer = dynamics(weights, 2, reference=0)["W"]
    assert layer["directions"] == {"90%": 2, "99%": 2, "K": 2, "2K": 4}
    assert layer["share_2K"] == layer["known"] == [1.0, 1.0]
    assert layer["share_K"][-1] == pytest.approx(500 / 505, abs=1e-4)
    assert layer["increment"][-1][:4] == pytest.approx([40, 20, 4, 2], rel=1e-4)
    for side in layer["turned"].values():
        assert max(part["largest"][-1] for part in side.values()) < 1e-5


def test_directions_that_leave_a_block_are_counted():
    """The middle's first vector comes to the top: one direction has left each of the two, by a right angle."""
    weights = {0: {"W": torch.diag(torch.arange(8.0, 0.0, -1.0))}}
    weights[1] = {"W": weights[0]["W"] + torch.diag(torch.tensor([0.0, 0, 5, 0, 0, 0, 0, 0]))}
    layer = dynamics(weights, 2, reference=0)["W"]
    for side in layer["turned"].values():
        assert [side[block]["gone"][-1] for block in ("top", "middle", "bottom")] == pytest.approx([1, 1, 0], abs=1e-6)
        assert side["top"]["largest"][-1] == pytest.approx(torch.pi / 2, abs=1e-3)
    assert layer["share_K"] == [1.0]


@pytest.mark.parametrize("file", sorted((RECIPES / "spectra").glob("*.yaml")), ids=lambda file: file.stem)
def test_each_yaml_runs_and_is_not_run_again(file, tmp_path, capsys, monkeypatch):
    recipe = yaml.safe_load(file.read_text()) | TINY
    if recipe["model"] == "vit":
        recipe["shape"] = SHAPE
    elif recipe["model"] == "mlp":
        recipe["widths"] = "32-32-32-32"
    else:
        base = ViTConfig(**SHAPE | {"num_hidden_layers": 12}, image_size=16, num_channels=1)
        ViTForImageClassification(base).save_pretrained(tmp_path / "base")
        recipe |= {"model": str(tmp_path / "base"), "image_size": 16, "bf16": False}  # slow on CPUs
    settings = tmp_path / file.name
    settings.write_text(yaml.safe_dump(recipe))
    command.main([str(settings)])
    before, printed = results(tmp_path), capsys.readouterr()
    assert before.keys() == {run.name for run in read(settings).runs}
    runs = list(before.values())
    assert len(runs) == len(recipe.get("runs", [1]))
    for run in runs:
        assert {"versions", "hardware", "commit"} <= run.keys()
        assert [run["steps"][0], run["steps"][-1]] == [0, 4]
        assert len(run["layers"]) == 3
        for layer in run["layers"].values():
            assert len(layer["singular_values"]) == len(run["steps"]) == len(layer["change"])
            assert layer["known"][-1] == pytest.approx(layer["share_2K"][-1], rel=1e-3)
            whole = layer["accuracy"][str(max(map(int, layer["accuracy"])))]
            assert whole == pytest.approx(run["accuracy"], abs=0.05)  # 20 of 32 or 16 directions
    assert "step 4 of 4" in printed.out
    monkeypatch.setattr(command, "conclude", lambda *rest: None)
    command.main([str(settings)])
    assert results(tmp_path) == before
    assert "step 4 of 4" not in capsys.readouterr().out
    assert (tmp_path / "plots" / f"{file.stem}.png").stat().st_size > 10_000
