"""Coordinates: the increment that a tensor is given by what P moves."""

import pytest
import torch
from torch import nn

from subspace_peft.adapter.layer import SubspaceLayer
from subspace_peft.adapter.walk import unique_coordinates
from tests.cases import BY_NAME, base_outputs, dense_P, loss, move, outputs, theta_d, train, wrap


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
            z = model.base_model.model.subspace_vectors.normalised("default")
            rows, columns = c.shape[0], c.shape[1:].numel() if isinstance(c.shape, torch.Size) else None
            columns = columns or plain.get_parameter(path)[0].numel()
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


@pytest.mark.parametrize("name", ["mlp", "norms", "recurrent"])
def test_weight_identity_is_full_fine_tuning(name):
    case = BY_NAME[name]
    model = wrap(case, projection="identity", d=None)
    plain = case.model()
    assert sum(p.numel() for p in plain.parameters()) == model.base_model.D
    train(model, case, steps=3)
    train(plain, case, steps=3)
    torch.testing.assert_close(outputs(model, case), outputs(plain, case), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("normalization", ["rows", "columns"])
def test_normalisation_is_over_all_of_theta(normalization):
    model = wrap(BY_NAME["convnet"], normalization=normalization, d=11)
    P = torch.cat(list(dense_P(model).values())).double()
    squares = P.square().sum(0 if normalization == "columns" else 1)
    if normalization == "columns":
        torch.testing.assert_close(squares, torch.ones(11, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    else:
        assert squares.mean().item() == pytest.approx(1, rel=1e-5)


def test_adding_targets_changes_no_other_rows():
    few = dense_P(wrap(BY_NAME["mlp"], target_modules=["fc2"]))
    all_ = dense_P(wrap(BY_NAME["mlp"]))
    for name, P in few.items():
        ratio = (P / all_[name])[all_[name].abs() > 1e-3]
        torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-4, atol=1e-4)


def test_the_layer_of_a_linear_runs_low_rank_through_both_factors():
    """The product of size rows x columns is not formed where x can go through A and B in turn."""
    model = wrap(BY_NAME["mlp"], **LOW_RANK)
    move(model)
    layer = model.base_model.model.fc1
    assert isinstance(layer, SubspaceLayer)
    assert isinstance(layer.base_layer, nn.Linear)
    seen = []
    layer.coordinates["default"]["weight"].increment = lambda z: seen.append(z)
    layer(torch.randn(2, 6))
    assert not seen
