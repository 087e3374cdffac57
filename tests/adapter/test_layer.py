"""SubspaceLayer: everything that torch and models do with a module besides calling it."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from subspace_peft.adapter.layer import SubspaceLayer
from tests.cases import BY_NAME, base_outputs, loss, move, moved_base, outputs, run, settings, theta_d, train, wrap
from tests.models import Bare


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@torch.no_grad()
def test_the_fast_path_of_torchs_encoder_does_not_bypass_the_adapter(nested, norm_first):
    """In evaluation mode nn.TransformerEncoderLayer reads the weights of its submodules and calls none of them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first)
    plain = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    model = get_peft_model(copy.deepcopy(plain), settings(target_modules=".*(linear1|linear2|self_attn)")).eval()
    move(model, size=0.3)
    x = torch.randn(3, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    for mask in (None, padding):
        adapted = model(x, src_key_padding_mask=mask)
        assert not torch.allclose(adapted[0], plain(x, src_key_padding_mask=mask)[0], atol=1e-3)
        merged = copy.deepcopy(model).merge_and_unload()
        expected = merged(x, src_key_padding_mask=mask)
        kept = torch.ones(3, 5).bool() if mask is None else ~mask
        torch.testing.assert_close(adapted[kept], expected[kept], rtol=1e-4, atol=1e-5)


def test_attention_is_moved_in_both_of_its_paths():
    case = BY_NAME["attention"]
    model = wrap(case)
    move(model, size=0.3)
    expected = outputs(moved_base(case, model), case)
    torch.testing.assert_close(outputs(model, case), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(model, case.batch()).detach(), expected, rtol=1e-4, atol=1e-5)


def test_the_layer_answers_for_its_base():
    model = wrap(BY_NAME["mlp"]).base_model.model
    assert isinstance(model.fc1, SubspaceLayer)
    assert (model.fc1.in_features, model.fc1.out_features) == (6, 10)
    assert model.fc1.training is model.fc1.base_layer.training
    assert repr(model.fc1).startswith("subspace_peft.SubspaceLayer(")
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.fc1.no_such_thing


def test_submodules_of_a_wrapped_module_can_be_reached():
    model = wrap(BY_NAME["bare"]).base_model.model
    assert isinstance(model.scale, SubspaceLayer)
    assert isinstance(model.scale.inner, SubspaceLayer)
    assert model.scale.inner.in_features == 4


def test_nothing_is_left_in_the_base_after_an_error():
    case = BY_NAME["recurrent"]
    model = wrap(case)
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 3, 99))
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
    outputs(model, case)


def test_the_weights_of_the_base_are_its_parameters_after_a_forward():
    case = BY_NAME["bare"]
    model = wrap(case)
    move(model)
    outputs(model, case)
    names = [n.replace(".base_layer", "") for n, _ in model.base_model.model.named_parameters() if "theta_d" not in n]
    assert names == [name for name, _ in Bare().named_parameters()]


@pytest.mark.parametrize("projection", ["dense", "sparse", "fastfood", "fastjl", "kronecker"])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_P_is_not_kept_for_backward(name, projection):
    """Backward needs what the plain model saves and the moved weights, and nothing of the size of P."""
    case = BY_NAME[name]
    model = wrap(case, d=100, projection=projection).train()
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model, case.batch())
    assert sizes
    assert max(sizes) < 10 * 100  # P of the smallest weight matrix has 40 x 100 entries


def test_training_under_inference_mode_first():
    """A projection drawn in inference mode can be trained with afterwards."""
    case = BY_NAME["mlp"]
    for projection in ("dense", "sparse", "fastfood", "fastjl", "kronecker"):
        model = wrap(case, projection=projection)
        with torch.inference_mode():
            run(model, case.batch())
        train(model, case)
        assert not torch.equal(outputs(model, case), base_outputs(case))


@pytest.mark.parametrize("projection", ["dense", "sparse", "fastfood", "fastjl", "kronecker"])
def test_without_the_cache_the_numbers_are_the_same(projection):
    case = BY_NAME["convnet"]
    models = [wrap(case, projection=projection, cache_projection=cache) for cache in (True, False)]
    for model in models:
        train(model, case)
    assert torch.equal(theta_d(models[0]), theta_d(models[1]))
    assert torch.equal(outputs(models[0], case), outputs(models[1], case))


def test_derivatives_of_functions():
    """torch.func over theta_d: a Jacobian by vmap, which curvature measurements need."""
    case = BY_NAME["mlp"]
    model = wrap(case)
    move(model)
    name = "base_model.model.subspace_vectors.subspace_peft_theta_d.default.vector"

    x = case.batch()

    def output(vector):
        return torch.func.functional_call(model, {name: vector}, (x,))

    vector = theta_d(model).detach()
    jacobian = torch.func.jacrev(output)(vector)
    assert jacobian.shape == (3, 4, 7)
    step = 1e-2 * torch.ones(7)
    difference = (output(vector + step) - output(vector - step)) / 2
    torch.testing.assert_close(jacobian @ step, difference, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(torch.func.jacfwd(output)(vector), jacobian, rtol=1e-3, atol=1e-4)
