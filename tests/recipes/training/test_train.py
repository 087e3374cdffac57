"""The origin and the subspace that a run's settings name."""

import copy

import pytest
import torch
from accelerate import Accelerator

from recipes.tasks.data import load
from recipes.tasks.models import build
from recipes.training.settings import Settings
from recipes.training.tickets import lottery_ticket, random_ticket
from recipes.training.train import origin, train, wrap
from subspace_peft import Trajectory


FULL = Settings(model="fc", optimizer="sgd", lr=0.05, momentum=0.9, batch_size=64, epochs=2, sample_steps=4)
DATA = load("digits", "", "train"), load("digits", "", "test")


@pytest.fixture
def trajectory(tmp_path):
    train(FULL, Accelerator(cpu=True), *DATA, trajectory=tmp_path)
    return tmp_path


def weights(network):
    return {name: p.detach() for name, p in network.named_parameters()}


def flat(network):
    return torch.cat([w.flatten() for w in weights(network).values()]).double()


def test_a_trajectory_has_a_sample_at_its_start_and_each_so_many_steps(trajectory):
    assert Trajectory(trajectory).steps == list(range(1 + 2 * (1437 // 64) // 4))


@pytest.mark.parametrize("t", [4, 24])  # in the first and in the second epoch
def test_burn_in_is_the_point_t_of_the_trajectory_of_that_seed(trajectory, t):
    settings = Settings(model="fc", projection="fastjl", d=3, batch_size=64, burn_in=t)
    sample = Trajectory(trajectory).sample(t // 4)
    for name, parameter in weights(origin(settings, DATA[0], None, "cpu")).items():
        assert torch.equal(parameter, sample[name])


def test_a_lottery_subspace_is_spanned_by_increments(trajectory):
    settings = Settings(model="fc", projection="basis", d=3, samples=9, increments=True, trajectory=FULL)
    model = wrap(origin(settings, DATA[0], trajectory, "cpu"), settings, trajectory)
    samples = Trajectory(trajectory)
    points = torch.stack([torch.cat([w.flatten() for w in samples.sample(i).values()]) for i in range(10)]).double()
    _, _, directions = torch.linalg.svd(points.diff(dim=0), full_matrices=False)
    theta_d, start = (
        model.base_model.model.subspace_vectors.subspace_peft_theta_d["default"],
        flat(build("fc", "digits")),
    )
    for j in range(3):
        theta_d.data = torch.eye(3)[j]
        move = flat(copy.deepcopy(model).merge_and_unload()) - start
        assert abs(torch.dot(move, directions[j])) == pytest.approx(1, abs=1e-4)


def test_random_pruning_leaves_d_weights_and_moves_those():
    settings = Settings(model="fc", projection="coordinate", d=50, pruned=True, seed=3, burn_in=2, batch_size=64)
    network = origin(settings, DATA[0], None, "cpu")
    mask = random_ticket(build("fc", "digits"), 50, 3)
    assert all((weights(network)[name] != 0).equal(mask[name]) for name in mask)
    assert wrap(network, settings).peft_config["default"].d == 50


def test_a_lottery_ticket_is_rewound(trajectory):
    full = Settings(model="fc", optimizer="sgd", lr=0.05, momentum=0.9, batch_size=64, epochs=2)
    settings = Settings(model="fc", projection="coordinate", d=50, pruned=True, trajectory=full)
    network = origin(settings, DATA[0], trajectory, "cpu")
    mask, first = lottery_ticket(Trajectory(trajectory).sample(-1), 50), weights(build("fc", "digits"))
    for name, parameter in weights(network).items():
        assert torch.equal(parameter, torch.where(mask[name], first[name], 0.0))


def test_training_images_are_measured_where_it_is_asked_for():
    settings = Settings(
        model="fc", projection="fastjl", d=20, lr=0.3, epochs=2, batch_size=64, measured=100, center=True
    )
    result = train(settings, Accelerator(cpu=True), *DATA)
    start, *epochs = result["origin"], *result["epochs"]
    for values in (start, *epochs):
        assert values.keys() >= {"test_accuracy", "train_accuracy", "loss"}
        assert (100 * values["train_accuracy"]) % 1 == pytest.approx(0, abs=1e-9)
    assert epochs[-1]["loss"] < start["loss"]
    assert epochs[-1]["train_accuracy"] > start["train_accuracy"]
