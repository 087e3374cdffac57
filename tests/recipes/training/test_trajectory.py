"""Runs in the basis of another run's trajectory."""

import shutil

import pytest
import torch

from recipes import run
from recipes.lab.grid import read
from recipes.tasks.models import build
from recipes.training import train
from subspace_peft import Trajectory
from tests.recipes.files import results


def test_a_basis_comes_from_the_trajectory_of_another_run(dldr, capsys):
    run.main([str(dldr)])
    sgd, *others = read(dldr).runs
    assert {other.trajectory.name for other in others} == {sgd.name}
    assert Trajectory(dldr.parent / "trajectories" / sgd.name).steps == [0, 1, 2, 3, 4]
    found = results(dldr.parent)
    assert found.keys() == {settings.name for settings in (sgd, *others)}
    assert [found[other.name]["d"] for other in others] == [2, 2]
    assert "P⁺-BFGS" in capsys.readouterr().out


@pytest.mark.usefixtures("unreported")
def test_a_basis_is_of_the_first_samples_of_the_trajectory(dldr):
    run.main([str(dldr)])
    _, settings, _ = read(dldr).runs
    folder = dldr.parent / "trajectories" / settings.trajectory.name
    model = train.wrap(build(settings.model, settings.dataset), settings, folder)
    basis = Trajectory(folder, last=3).basis(2)
    move = model.base_model.model[1].get_delta_weight
    model.base_model.model.subspace_vectors.subspace_peft_theta_d["default"].data = torch.tensor([1.0, 0.0])
    torch.testing.assert_close(move("default"), basis["1.weight"][..., 0])


@pytest.mark.usefixtures("unreported")
def test_a_trajectory_that_is_gone_is_recorded_again_where_a_run_needs_it(dldr):
    run.main([str(dldr)])
    sgd, other, _ = read(dldr).runs
    before = results(dldr.parent)[sgd.name]
    shutil.rmtree(dldr.parent / "trajectories")
    run.main([str(dldr)])
    assert not (dldr.parent / "trajectories").exists()
    (dldr.parent / "results" / f"{other.name}.json").unlink()
    run.main([str(dldr)])
    assert results(dldr.parent)[sgd.name] == before
    assert len(Trajectory(dldr.parent / "trajectories" / sgd.name)) == 5
