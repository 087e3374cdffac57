"""Low-rank coordinates: increments of two or three factors."""

import pytest
import torch

from subspace_peft.adapter.walk import find_vectors, unique_coordinates
from tests.cases import BY_NAME, base_outputs, loss, move, outputs, replaced, theta_d, train, wrap


LOW_RANK = {"coordinates": "low_rank", "rank": 2, "d": 9, "parameters": ["weight"]}


def coordinates(model):
    return unique_coordinates(model, "default")


@pytest.mark.parametrize("name", ["mlp", "convnet", "embeddings", "llama"])
def test_low_rank_starts_at_the_base(name):
    case = BY_NAME[name]
    assert torch.equal(outputs(wrap(case, **LOW_RANK), case), base_outputs(case))


@pytest.mark.parametrize("name", ["mlp", "convnet", "embeddings", "gpt2"])
@pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning")
def test_low_rank_outputs_are_those_of_the_product(name):
    case = BY_NAME[name]
    model = wrap(case, **LOW_RANK, alpha=4.0)
    move(model, size=0.3)
    plain = case.model()
    with torch.no_grad():
        for path, c in coordinates(model).items():
            z = find_vectors(model).normalised("default")
            rows, columns = c.shape[0], plain.get_parameter(path)[0].numel()
            B = c.projections[".B"](z).view(rows, 2)
            A = c.start(z.device)[-1] + c.projections[".A"](z).view(2, columns)
            plain.get_parameter(path).add_((4.0 / 2 * B @ A).view(c.shape))
    torch.testing.assert_close(outputs(model, case), outputs(plain, case), rtol=1e-4, atol=1e-5)
    plain = model.merge_and_unload()
    torch.testing.assert_close(outputs(plain, case), outputs(model_of(case), case), rtol=1e-4, atol=1e-5)


def model_of(case):
    model = wrap(case, **LOW_RANK, alpha=4.0)
    move(model, size=0.3)
    return model


@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_low_rank_gradient_by_differences(name):
    case = BY_NAME[name]
    model = wrap(case, **LOW_RANK).double()
    with torch.no_grad():
        theta_d(model).data = 0.1 * torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = case.batch()
    x = x.double() if x.is_floating_point() else x
    loss(model, x).backward()
    vector, h = theta_d(model), 1e-5
    for i in range(9):
        with torch.no_grad():
            vector[i] += h
            above = loss(model, x)
            vector[i] -= 2 * h
            below = loss(model, x)
            vector[i] += h
        assert vector.grad[i].item() == pytest.approx(((above - below) / (2 * h)).item(), rel=1e-2, abs=1e-4)


def test_A_is_drawn_in_LoRAs_range():
    model = wrap(BY_NAME["llama"], **LOW_RANK, target_modules="all-linear")
    for c in coordinates(model).values():
        bound = c.shape[1] ** -0.5
        A = c.start(torch.device("cpu"))[-1]
        assert A.abs().max() <= bound
        assert A.abs().max() > bound / 4
        assert A.unique().numel() > A.numel() / 2


def test_low_rank_leaves_vectors_alone():
    model = wrap(BY_NAME["convnet"], **{**LOW_RANK, "parameters": None})
    assert set(coordinates(model)) == {"conv1.weight", "conv2.weight", "head.weight"}
    shapes = {(4, 27), (6, 18), (5, 6)}
    assert sum(2 * (rows + columns) for rows, columns in shapes) == model.base_model.D


def test_low_rank_identity_is_LoRA():
    """d = D = all of A and B: one step of SGD moves B only, since B_0 = 0."""
    case = BY_NAME["mlp"]
    model = wrap(case, coordinates="low_rank", rank=2, projection="identity", d=None, parameters=["weight"])
    assert model.base_model.D == 2 * (6 + 10 + 10 + 4) == theta_d(model).numel()
    loss(model, case.batch()).backward()
    c = coordinates(model)["fc1.weight"]
    assert c.projections[".B"](theta_d(model).grad).count_nonzero() == 20
    assert c.projections[".A"](theta_d(model).grad).count_nonzero() == 0
    train(model, case)
    assert not torch.equal(outputs(model, case), base_outputs(case))


@pytest.mark.parametrize("name", ["mlp", "convnet", "embeddings", "llama"])
def test_three_factors_of_an_increment_start_at_the_base(name):
    case = BY_NAME[name]
    model = replaced(name, replace_weight=False, factors=3)
    assert torch.equal(outputs(model, case), base_outputs(case))
    train(model, case)
    assert not torch.equal(outputs(model, case), base_outputs(case))
