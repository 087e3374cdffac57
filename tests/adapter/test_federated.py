"""Federated averages: the mean of adapters, entry by entry, is the adapter of the mean of the models."""

import copy
from functools import reduce

import numpy as np
import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from subspace_peft import SubspaceConfig
from subspace_peft.adapter.fingerprint import check_mark, mark
from tests.cases import BY_NAME, Case, move, moved_base, outputs, theta_d, wrap


SIZES = [5, 30, 12]
CASE = BY_NAME["mlp"]


def by_numpy(states):
    arrays = {key: np.stack([state[key].numpy() for state in states]) for key in states[0]}
    return {key: torch.tensor(np.average(array, 0, weights=SIZES)) for key, array in arrays.items()}


def by_flower(states):
    """As flwr's FedAvg: each array times the client's size, their sum, divided by the sum of the sizes."""
    clients = [[tensor.numpy() * size for tensor in state.values()] for state, size in zip(states, SIZES, strict=True)]
    means = [reduce(np.add, arrays) / sum(SIZES) for arrays in zip(*clients, strict=True)]
    return {key: torch.tensor(mean) for key, mean in zip(states[0], means, strict=True)}


def by_torch(states):
    repeated = [s for s, n in zip(states, SIZES, strict=True) for _ in range(n)]
    return {key: torch.stack([state[key] for state in repeated]).mean(0) for key in states[0]}


def train_on_own_data(model: nn.Module, case: Case, seed: int) -> None:
    """A training step for batch norms: they see data that no other client has."""
    torch.manual_seed(seed)
    with torch.no_grad():
        model.train()(case.inputs())
    model.eval()


def clients(case: Case, **changes) -> list[nn.Module]:
    models = []
    for seed in range(3):
        models.append(wrap(case, **changes))
        move(models[-1], size=0.2, seed=seed)
        for step in range(1 + seed):
            train_on_own_data(models[-1], case, 10 * seed + step)
    return models


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    return sum(n * tensor.double() for n, tensor in zip(SIZES, tensors, strict=True)) / sum(SIZES)


def mean_of_plain_models(case: Case, models: list[nn.Module]) -> nn.Module:
    """The oracle: plain models with moved weights see the same data, and their state dicts are averaged."""
    states = []
    for seed, model in enumerate(models):
        plain = moved_base(case, model)
        for step in range(1 + seed):
            train_on_own_data(plain, case, 10 * seed + step)
        states.append(plain.state_dict())
    plain = case.model()
    plain.load_state_dict({key: mean([state[key] for state in states]) for key in states[0]})
    return plain


@pytest.mark.parametrize("average", [by_numpy, by_flower, by_torch])
@pytest.mark.parametrize("case", [CASE, BY_NAME["convnet"]], ids=str)
def test_the_mean_of_the_adapters_is_the_mean_of_the_models(case, average):
    models = clients(case)
    server = wrap(case)
    set_peft_model_state_dict(server, average([get_peft_model_state_dict(model) for model in models]))
    expected = outputs(mean_of_plain_models(case, models), case)
    torch.testing.assert_close(outputs(server, case), expected, rtol=1e-5, atol=1e-5)
    expected = mean([theta_d(model) for model in models])
    torch.testing.assert_close(theta_d(server).double(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "changes",
    [
        {"projection": "fastfood", "save_projection": True},
        {"projection": "sparse", "save_projection": True},
        {"projection": "coordinate", "d": None, "mask": torch.arange(114) % 3 == 0},
        {"projection": "basis", "basis": torch.linalg.qr(torch.arange(570.0).view(114, 5).sin()).Q, "d": None},
        {"projection": "dense", "coordinates": "low_rank", "rank": 2},
    ],
    ids=lambda changes: changes["projection"],
)
def test_averages_of_everything_that_a_file_can_hold_load(changes):
    models = clients(CASE, **changes)
    server = copy.deepcopy(models[0])
    set_peft_model_state_dict(server, by_flower([get_peft_model_state_dict(model) for model in models]))
    with torch.no_grad():
        theta_d(models[0]).copy_(theta_d(server))
    torch.testing.assert_close(outputs(server, CASE), outputs(models[0], CASE), rtol=1e-5, atol=1e-6)


def test_counts_of_batches_are_whole_after_averaging():
    models = clients(BY_NAME["convnet"])
    server = wrap(BY_NAME["convnet"])
    set_peft_model_state_dict(server, by_numpy([get_peft_model_state_dict(model) for model in models]))
    key = next(key for key in server.state_dict() if "num_batches_tracked" in key and key.endswith("default"))
    count = server.state_dict()[key]
    assert count.dtype == torch.int64
    assert count == round((5 * 1 + 30 * 2 + 12 * 3) / 47)


def test_adapters_of_different_subspaces_have_no_average():
    states = [get_peft_model_state_dict(wrap(CASE, seed=seed)) for seed in (0, 0, 1)]
    with pytest.raises(ValueError, match="must share one P to be averaged"):
        set_peft_model_state_dict(wrap(CASE), by_numpy(states))


def with_mask(seed: int):
    """Positions of so large a tensor that float32 rounds their average."""
    torch.manual_seed(seed)
    mask = torch.zeros(2**23, dtype=torch.bool)
    mask[torch.randperm(2**23)[:1000]] = True
    base = nn.Sequential(nn.Linear(2**11, 2**12, bias=False))
    return get_peft_model(base, SubspaceConfig(projection="coordinate", target_modules=["0"], mask=mask))


def test_the_mask_stays_what_it_is():
    server = with_mask(0)
    state = get_peft_model_state_dict(server)
    key = next(key for key in state if "_P." in key)
    mean = {name: sum(share * tensor for share in (4 / 7, 1 / 7, 2 / 7)) for name, tensor in state.items()}
    assert not torch.equal(mean[key].round().long(), state[key])
    set_peft_model_state_dict(server, mean)
    assert torch.equal(get_peft_model_state_dict(server)[key], state[key])
    other = get_peft_model_state_dict(with_mask(1))
    mean = {name: (tensor + other[name]) / 2 for name, tensor in state.items()}
    with pytest.raises(ValueError, match=r"positions or signs of `0\.weight` in this average are not those"):
        set_peft_model_state_dict(server, mean)


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 1_000), (torch.float64, 2_000), (torch.float16, 2)])
def test_the_average_of_many_marks(dtype, count):
    """Equal ones are the mark; a stranger among them is noticed."""
    for seed in range(20):
        config, stranger = SubspaceConfig(d=4, seed=seed), SubspaceConfig(d=4, seed=seed + 1)
        others = sum(mark(config).to(dtype) / count for _ in range(count - 1))
        check_mark(others + mark(config).to(dtype) / count, config)
        with pytest.raises(ValueError, match="compute it in float64"):
            check_mark(others + mark(stranger).to(dtype) / count, config)


def test_an_average_that_was_rounded_is_refused_with_the_way_out():
    config = SubspaceConfig(d=4)
    with pytest.raises(ValueError, match="compute it in float64"):
        check_mark(sum(mark(config).bfloat16() / 100 for _ in range(100)), config)
