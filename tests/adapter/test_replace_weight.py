"""replace_weight: W = B A in place of W_0."""

import dataclasses

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict

from subspace_peft import SubspaceConfig
from subspace_peft.adapter.walk import unique_coordinates
from subspace_peft.coordinates.starts import STARTS
from tests.cases import BY_NAME, REPLACED, REPLACED_TARGETS, loss, move, outputs, product_base, replaced, run, theta_d


CLOSE = {"rtol": 1e-4, "atol": 1e-4}
pytestmark = pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning")


@pytest.mark.parametrize("factors", [2, 3])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["mlp", "convnet", "embeddings", "tied", "gpt2", "llama"])
def test_the_weight_is_the_product(name, start, factors):
    model, case = replaced(name, start=start, factors=factors), BY_NAME[name]
    torch.testing.assert_close(outputs(model, case), outputs(product_base(name, model), case), **CLOSE)
    move(model, size=0.3)
    expected = outputs(product_base(name, model), case)
    torch.testing.assert_close(outputs(model, case), expected, **CLOSE)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, case), expected, **CLOSE)


@pytest.mark.parametrize("factors", [2, 3])
@pytest.mark.parametrize("name", ["mlp", "convnet", "gpt2"])
def test_a_weight_of_that_rank_is_left_as_it_is(name, factors):
    """The truncated SVD of a weight that has the rank of the factors is the weight."""
    case, plain = BY_NAME[name], BY_NAME[name].model()
    targets = unique_coordinates(replaced(name), "default")
    with torch.no_grad():
        for path in targets:
            weight = plain.get_parameter(path)
            U, S, Vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
            weight.copy_((U[:, :2] * S[:2] @ Vh[:2]).view(weight.shape))
    expected = outputs(plain, case)
    config = SubspaceConfig(**{**REPLACED, "target_modules": REPLACED_TARGETS[name], "factors": factors})
    torch.testing.assert_close(outputs(get_peft_model(plain, config).eval(), case), expected, **CLOSE)


@pytest.mark.parametrize("name", ["mlp", "convnet", "embeddings"])
def test_every_entry_of_theta_d_has_a_gradient(name):
    for changes in ({}, {"replace_weight": False}, {"replace_weight": False, "factors": 3}, {"factors": 3}):
        model = replaced(name, **changes)
        loss(model, BY_NAME[name].batch()).backward()
        assert (theta_d(model).grad != 0).all()


@pytest.mark.parametrize("changes", [{}, {"factors": 3, "gamma": 0.3}, {"factors": 3, "replace_weight": False}])
def test_gradient_by_differences(changes):
    case = BY_NAME["mlp"]
    model = replaced("mlp", **changes).double()
    x, vector, h = case.batch().double(), theta_d(model), 1e-6
    with torch.no_grad():
        vector.copy_(0.3 * torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    loss(model, x).backward()
    for i in range(9):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                vector[i] += sign * h
                losses.append(loss(model, x).item())
                vector[i] -= sign * h
        assert vector.grad[i].item() == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=1e-4, abs=1e-6)


def test_a_step_of_theta_d_moves_the_outer_factors_by_gamma():
    def factors(gamma, size):
        model = replaced("mlp", factors=3, gamma=gamma, projection="identity", d=None)
        with torch.no_grad():
            theta_d(model).fill_(size)
        c = unique_coordinates(model, "default")["fc1.weight"]
        z = model.base_model.model.subspace_vectors.normalised("default")
        start = c.start(z.device)
        left, right = c.factors(z)
        inner = start[1] + size
        return left @ torch.linalg.inv(inner) - start[0], right - start[2]

    for gamma, by in ((None, 1.0), (0.25, 0.25), (0, 0.0)):
        for change in factors(gamma, 0.1):
            torch.testing.assert_close(change, torch.full_like(change, 0.1 * by), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("start", STARTS)
def test_a_weight_that_is_not_finite_changes_nothing(start):
    model = BY_NAME["mlp"].model()
    with torch.no_grad():
        model.fc2.weight[0, 0] = torch.nan
    config, names = (
        SubspaceConfig(**{**REPLACED, "target_modules": ["fc1", "fc2"], "start": start}),
        dict(model.named_modules()),
    )
    with pytest.raises(ValueError, match="must be finite to be replaced, `fc2.weight` is not; repair"):
        get_peft_model(model, config)
    assert dict(model.named_modules()).keys() == names.keys()
    assert config.D is None


@pytest.mark.parametrize("start", STARTS)
def test_a_weight_of_zeros_trains(start):
    model = BY_NAME["mlp"].model()
    with torch.no_grad():
        model.fc2.weight.zero_()
    model = get_peft_model(model, SubspaceConfig(**{**REPLACED, "target_modules": ["fc2"], "start": start}))
    loss(model, BY_NAME["mlp"].batch()).backward()
    assert (theta_d(model).grad != 0).all()


def test_a_used_config_is_of_no_new_adapter():
    used = SubspaceConfig(**{**REPLACED, "target_modules": ["fc1"]})
    used = get_peft_model(BY_NAME["mlp"].model(), used).peft_config["default"]
    again = get_peft_model(BY_NAME["mlp"].model(), dataclasses.replace(used, seed=3))
    for use in (lambda: outputs(again, BY_NAME["mlp"]), lambda: get_peft_model_state_dict(again)):
        with pytest.raises(ValueError, match="for a new one make a new SubspaceConfig"):
            use()


def test_in_double_precision_factors_are_too():
    model = replaced("mlp").double()
    move(model, size=0.3)
    x = BY_NAME["mlp"].batch().double()
    alone = run(model, x)
    model.merge_adapter()
    torch.testing.assert_close(run(model, x), alone, rtol=1e-12, atol=1e-12)
