"""The scale of an adapter's increments, which diffusers sets on every layer, and sums of adapters."""

import copy

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from subspace_peft import fold
from subspace_peft.adapter.walk import named_layers, unique_coordinates
from tests.cases import BY_NAME, base_outputs, dense_P, move, outputs, replaced, settings, theta_d, wrap


def layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def activate(model, adapters, weights):
    """As diffusers' set_adapters: set_weights_and_activate_adapters of its version 0.42."""
    for layer in layers(model):
        layer.set_adapter(adapters)
        for adapter, weight in zip(adapters, weights, strict=True):
            layer.set_scale(adapter, weight)


@torch.no_grad()
def scaled_base(case, model, scales):
    """The oracle: a plain model with the scaled increments, made while every scale was 1."""
    plain = case.model()
    for adapter, scale in scales.items():
        for name, coordinates in unique_coordinates(model, adapter).items():
            z = theta_d(model, adapter) * model.base_model.model.subspace_vectors.scales[adapter]
            plain.get_parameter(name).add_(scale * coordinates.increment(z))
    return plain


@pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning")
@pytest.mark.parametrize("changes", [{}, {"coordinates": "low_rank", "rank": 2}], ids=["weight", "low_rank"])
@pytest.mark.parametrize("name", ["mlp", "convnet", "tied"])
def test_adapters_with_weights(name, changes):
    case = BY_NAME[name]
    model = wrap(case, "one", **changes)
    model.add_adapter("two", settings(seed=1, **changes))
    for adapter in ("one", "two"):
        move(model, adapter, size=0.3)
    for weights in ([0.5, -2.0], [1.0, 1.0], [0.0, 0.0]):
        expected = outputs(scaled_base(case, model, {"one": weights[0], "two": weights[1]}), case)
        activate(model, ["one", "two"], weights)
        torch.testing.assert_close(outputs(model.eval(), case), expected, rtol=1e-4, atol=1e-5)
        activate(model, ["one", "two"], [1.0, 1.0])


@pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning")
@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_scaling_and_back(name):
    """diffusers scales every layer for one call of the pipeline."""
    case = BY_NAME[name]
    model = wrap(case)
    move(model, size=0.3)
    before, expected = outputs(model, case), outputs(scaled_base(case, model, {"default": 0.5}), case)
    for layer in layers(model):
        layer.scale_layer(0.5)
    torch.testing.assert_close(outputs(model, case), expected, rtol=1e-5, atol=1e-6)
    for layer in layers(model):
        layer.unscale_layer(0.5)
    assert torch.equal(outputs(model, case), before)
    for layer in layers(model):
        layer.scale_layer(0.3)
        layer.unscale_layer()
    assert torch.equal(outputs(model, case), before)


def test_reading_merging_and_folding_see_the_scale():
    case = BY_NAME["mlp"]
    model = wrap(case)
    move(model, size=0.3)
    P, origin = dense_P(model)["fc1.weight"], case.model().fc1.weight
    weight = model.base_model.model.fc1.weight + 0
    activate(model, ["default"], [3.0])
    moved = origin + 3 * (P @ theta_d(model)).view_as(origin)
    torch.testing.assert_close(model.base_model.model.fc1.weight + 0, moved, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weight, moved)
    expected = outputs(model, case)
    folded = copy.deepcopy(model)
    fold(folded)
    for other in (folded, model.merge_and_unload()):
        torch.testing.assert_close(outputs(other, case), expected, rtol=1e-4, atol=1e-5)


def test_theta_d_trains_through_the_scale():
    model = get_peft_model(nn.Sequential(nn.Linear(3, 1, bias=False)), settings(projection="identity", d=None))
    activate(model, ["default"], [2.0])
    model(torch.ones(1, 3)).backward()
    assert torch.equal(theta_d(model).grad, torch.full((3,), 2.0))


def test_what_cannot_be_scaled_is_refused():
    model = replaced("mlp")
    activate(model, ["default"], [1.0])
    with pytest.raises(ValueError, match="replaces a weight has no increment to scale, got 0.5 for `fc1.weight`"):
        activate(model, ["default"], [0.5])
    model = wrap(BY_NAME["mlp"])
    model.merge_adapter()
    activate(model, ["default"], [1.0])
    with pytest.raises(ValueError, match="must be unmerged to be scaled, `fc1.weight` is merged; call unmerge"):
        activate(model, ["default"], [0.5])


def test_an_adapter_that_a_layer_does_not_have_is_passed_over():
    case = BY_NAME["mlp"]
    model = wrap(case, target_modules=["fc1"])
    model.add_adapter("other", settings(target_modules=["fc2"]))
    move(model, size=0.3)
    activate(model, ["default", "other"], [0.0, 0.5])
    torch.testing.assert_close(outputs(model.eval(), case), base_outputs(case))


def test_a_weighted_sum_is_exact():
    case = BY_NAME["mlp"]
    model = wrap(case, "one")
    model.add_adapter("two", settings())
    move(model, "one", seed=1)
    move(model, "two", seed=2)
    model.base_model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "sum")
    torch.testing.assert_close(theta_d(model, "sum"), 0.5 * theta_d(model, "one") - 2 * theta_d(model, "two"))
    model.set_adapter("sum")
    assert not torch.equal(outputs(model, case), outputs(case.model(), case))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "share one seeded P"),
        ({"d": 8}, "share one seeded P"),
        ({"projection": "dense"}, "share one seeded P"),
        ({"target_modules": ["fc1"]}, "share one seeded P"),
    ],
    ids=str,
)
def test_an_inexact_sum_is_refused(changes, message):
    model = wrap(BY_NAME["mlp"], "one")
    model.add_adapter("two", settings(**changes))
    with pytest.raises(ValueError, match=message):
        model.base_model.add_weighted_adapter(["one", "two"], [1, 1], "sum")
    assert set(model.peft_config) == {"one", "two"}


def test_other_inexact_sums_are_refused():
    low_rank = wrap(BY_NAME["mlp"], coordinates="low_rank", rank=2)
    with pytest.raises(ValueError, match="over weight coordinates"):
        low_rank.base_model.add_weighted_adapter(["default"], [2.0], "sum")
    convnet = wrap(BY_NAME["convnet"])
    with pytest.raises(ValueError, match="batch-norm statistics have no exact sum"):
        convnet.base_model.add_weighted_adapter(["default"], [2.0], "sum")
    mlp = wrap(BY_NAME["mlp"])
    with pytest.raises(ValueError, match="`weights` hold one number for each, got 2 for 1"):
        mlp.base_model.add_weighted_adapter(["default"], [1.0, 2.0], "sum")
    with pytest.raises(ValueError, match="must be 'linear', got 'svd'"):
        mlp.base_model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="svd")
    with pytest.raises(ValueError, match="needs a name of its own, 'default' is taken; choose another name"):
        mlp.base_model.add_weighted_adapter(["default"], [1.0], "default")
    with pytest.raises(ValueError, match="must be adapters of the model, got 'other'; it has default"):
        mlp.base_model.add_weighted_adapter(["other"], [1.0], "sum")
    for wrong in (None, float("nan")):
        with pytest.raises(ValueError, match=f"`weights` must be finite numbers, got {wrong}"):
            mlp.base_model.add_weighted_adapter(["default"], [wrong], "sum")
    with pytest.raises(ValueError, match="The name of an adapter must not .* contain a dot, .* got 'v1.0'"):
        mlp.base_model.add_weighted_adapter(["default"], [1.0], "v1.0")
    assert set(mlp.peft_config) == {"default"}


def test_a_sum_takes_adapters_at_their_scales():
    model = wrap(BY_NAME["mlp"], "one")
    move(model, "one", seed=1)
    first, *others = (layer for _, layer in named_layers(model))
    first.set_scale("one", 3.0)
    with pytest.raises(ValueError, match=r"must have one scale to be summed, 'one' has \[1.0, 3.0\]"):
        model.base_model.add_weighted_adapter(["one"], [0.5], "sum")
    for layer in others:
        layer.set_scale("one", 3.0)
    model.base_model.add_weighted_adapter(["one"], torch.tensor([0.5]), "sum")
    torch.testing.assert_close(theta_d(model, "sum"), 1.5 * theta_d(model, "one"))


def test_a_sum_of_adapters_with_heads_of_their_own_is_refused():
    """It would have the base's head, which no adapter has trained."""
    model = wrap(BY_NAME["mlp"], target_modules=["fc1"], modules_to_save=["fc2"])
    with pytest.raises(ValueError, match="save modules whole have no exact sum, 'default' saves `.*fc2`"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")
    assert set(model.peft_config) == {"default"}
