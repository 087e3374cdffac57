import json

import pytest

from recipes import run
from recipes.dldr import reconstruction
from recipes.lab.results import read_measurement


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(
        "report: optimisers\nmodel: fc\nepochs: 12\noptimizer: sgd\nlr: 0.3\nseed: [0, 1]\n"
        "threads: 1\nsave_trajectory: true\n"
    )
    return file


def test_enough_components_give_the_weights_back(recipe, capsys):
    run.main([str(recipe)])
    reconstruction.main([str(recipe), "--d", "12"])
    result = read_measurement(recipe.parent / "tiny.reconstruction.jsonl")
    assert [one["seed"] for one in result["runs"]] == [0, 1]
    for one in result["runs"]:
        ratios = one["explained_variance_ratio"]
        assert sum(ratios) == pytest.approx(1, abs=1e-2)
        assert ratios == sorted(ratios, reverse=True)
        assert one["accuracy"]["sampled"] == pytest.approx(one["accuracy"]["reconstructed"], abs=0.003)
        assert len(one["accuracy"]["sampled"]) == 13
    printed = capsys.readouterr().out
    assert "from 12 components" in printed
    figure = recipe.parent / "plots" / "tiny.reconstruction.png"
    figure.unlink()
    for sample in recipe.parent.glob("trajectories/*/*"):
        sample.unlink()
    reconstruction.main([str(recipe), "--report"])
    assert printed.endswith(capsys.readouterr().out)
    assert figure.stat().st_size > 10_000


def test_one_short_run_on_standardised_images(recipe, capsys):
    """The accuracies along the trajectory are those that training reported."""
    recipe.write_text(recipe.read_text().replace("epochs: 12", "epochs: 3\nstandardize: true").replace("[0, 1]", "0"))
    run.main([str(recipe)])
    reconstruction.main([str(recipe), "--d", "2"])
    (trained,) = (json.loads(f.read_text()) for f in (recipe.parent / "results").glob("????????????.json"))
    result = read_measurement(recipe.parent / "tiny.reconstruction.jsonl")
    expected = [epoch["test_accuracy"] for epoch in trained["epochs"]]
    assert result["runs"][0]["accuracy"]["sampled"][1:] == pytest.approx(expected, abs=1e-9)
    assert "nan" not in capsys.readouterr().out


def test_without_a_trajectory_it_says_how_to_record_one(recipe):
    with pytest.raises(ValueError, match="--save_trajectory true"):
        reconstruction.main([str(recipe)])
