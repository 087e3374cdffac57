"""Half-precision bases: theta_d is float32, and an increment below the resolution of the base still acts."""

import copy
from collections import OrderedDict

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrizations
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from subspace_peft.adapter.layer import SubspaceLayer
from subspace_peft.adapter.walk import unique_coordinates
from tests.cases import BY_NAME, CASES, loss, move, outputs, refused, run, settings, theta_d, train, wrap


HALF = [torch.bfloat16, torch.float16]
LINEAR = {  # a module with 4 input channels, and the shape of an input after its channels
    "linear": (lambda: nn.Linear(4, 3), ()),
    "conv1d_of_transformers": (lambda: Conv1D(3, 4), ()),
    "conv2d": (lambda: nn.Conv2d(4, 3, 2), (3, 3)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 3, 2), (3,)),
}


def targeted(model):
    return set(unique_coordinates(model, "default"))


def half(case, dtype, **changes):
    return get_peft_model(case.model().to(dtype), settings(**changes)).eval()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_a_half_precision_base_trains_in_float32(case, dtype):
    model = half(case, dtype)
    x = case.batch()
    x = x.to(dtype) if x.is_floating_point() else x
    assert theta_d(model).dtype == torch.float32
    start = run(model, x)
    with torch.no_grad():
        reference = run(case.model().to(dtype).requires_grad_(False), x)
    assert start.dtype == dtype
    torch.testing.assert_close(start, reference, rtol=2e-2, atol=2e-2)
    loss(model.train(), x).backward()
    assert theta_d(model).grad.dtype == torch.float32
    assert theta_d(model).grad.isfinite().all()
    assert theta_d(model).grad.count_nonzero() == 7


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", LINEAR)
@torch.no_grad()
def test_an_increment_below_the_bases_resolution_acts(kind, dtype):
    """With weights of 1 and inputs that cancel, the output of the base is 0 and that of the increment is all."""
    build, shape = LINEAR[kind]
    base = nn.Sequential(build()).to(dtype)
    base[0].weight.fill_(1)
    base[0].bias.fill_(0)
    x = torch.tensor([1.0, -1, 1, -1], dtype=dtype).view(1, 4, *(1 for _ in shape)).expand(2, 4, *shape)
    assert not base(x).any()
    model = get_peft_model(base, settings(parameters=["weight"])).eval()
    assert not model(x).any()
    move(model, size=0.02 * torch.finfo(dtype).eps)
    layer = model.base_model.model[0]
    increment = layer.get_delta_weight("default")
    weight = layer.base_layer.weight
    assert torch.equal((weight + increment).to(dtype), weight)
    expected = torch.func.functional_call(copy.deepcopy(layer.base_layer).float(), {"weight": increment}, (x.float(),))
    assert expected.count_nonzero() == expected.numel()
    torch.testing.assert_close(model(x).float(), expected, rtol=0.05, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["mlp", "llama", "convnet"])
def test_autocast(name):
    case = BY_NAME[name]
    model = wrap(case)
    train(model, case)
    expected = outputs(model, case)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(outputs(model, case).float(), expected, rtol=0.1, atol=0.1)
        value = loss(model.train(), case.batch())
    value.backward()
    assert theta_d(model).grad.dtype == torch.float32
    assert theta_d(model).grad.count_nonzero() == 7


def test_autocast_of_low_rank_coordinates():
    case = BY_NAME["llama"]
    model = wrap(case, coordinates="low_rank", rank=2, target_modules="all-linear")
    move(model)
    expected = outputs(model, case)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(outputs(model, case).float(), expected, rtol=0.1, atol=0.1)


def test_autocast_adapter_dtype():
    case = BY_NAME["mlp"]
    model = get_peft_model(case.model().bfloat16(), settings(), autocast_adapter_dtype=False)
    assert theta_d(model).dtype == torch.bfloat16
    model.add_adapter("other", settings(seed=1))
    assert theta_d(model, "other").dtype == torch.float32
    assert run(model, case.batch().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_merging_into_a_half_precision_base(dtype):
    case = BY_NAME["mlp"]
    model = half(case, dtype)
    move(model, size=1)
    x = case.batch().to(dtype)
    with torch.no_grad():
        adapted = run(model, x)
        plain = model.merge_and_unload(safe_merge=True)
        assert {p.dtype for p in plain.parameters()} == {dtype}
        torch.testing.assert_close(run(plain, x), adapted, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("projection", ["dense", "fastfood", "fastjl", "kronecker"])
def test_theta_d_stays_float32_under_autocast(projection):
    model = wrap(BY_NAME["norms"], projection=projection)
    move(model)
    layer = next(m for m in model.modules() if isinstance(m, SubspaceLayer))
    with torch.no_grad():
        expected = layer.increments(["default"])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = layer.increments(["default"])
    for path, increment in expected.items():
        assert torch.equal(under[path], increment)


def scaled_embedding():
    return BartScaledWordEmbedding(5, 4, padding_idx=None, embed_scale=2.0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("build", "rows"),
    [
        (lambda: nn.Embedding(5, 4), lambda w: w[1:4]),
        (scaled_embedding, lambda w: 2 * w[1:4]),
        (lambda: nn.EmbeddingBag(5, 4, mode="sum"), lambda w: w[1:4].sum(0)),
    ],
    ids=["embedding", "scaled", "bag"],
)
@torch.no_grad()
def test_an_embeddings_increment_below_its_resolution_acts(build, rows, dtype):
    base = nn.Sequential(build()).to(dtype)
    base[0].weight.copy_(torch.tensor([[0.0], [1], [-1], [0], [0]]).expand(5, 4))  # the sum over a bag is zero too
    model = get_peft_model(base, settings()).eval()
    x = torch.tensor([[1, 2, 3]])
    move(model, size=0.02 * torch.finfo(dtype).eps)
    layer = model.base_model.model[0]
    increment = layer.get_delta_weight("default")
    assert torch.equal((layer.base_layer.weight + increment).to(dtype)[1:3], layer.base_layer.weight[1:3])
    expected = rows(layer.base_layer.weight.double() + increment.double())
    zero = rows(layer.base_layer.weight.double()) == 0
    got = model(x)[0].double()
    assert got[zero].count_nonzero() == zero.sum() > 0
    torch.testing.assert_close(got[zero], expected[zero], rtol=0.05, atol=0.02 * expected[zero].abs().max().item())


@torch.no_grad()
def test_a_bag_of_maxima_is_not_linear():
    model = get_peft_model(nn.Sequential(nn.EmbeddingBag(5, 4, mode="max")).bfloat16(), settings()).eval()
    move(model, size=1)
    layer, x = model.base_model.model[0], torch.tensor([[1, 2, 3]])
    moved = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(model(x)[0].float(), moved[1:4].amax(0), rtol=0.01, atol=0.01)


COMPUTED = {
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map="cayley"),
    "weight_norm_by_a_hook": lambda: nn.utils.weight_norm(nn.Linear(6, 6)),
    "spectral_norm_by_a_hook": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
}


@pytest.mark.parametrize("targets", ["all", "all-linear"])
@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_computed_weights_start_at_the_base_and_move(kind, targets):
    dtype = torch.float32 if kind == "orthogonal" else torch.bfloat16  # it solves a system, in full precision alone

    def build():
        torch.manual_seed(0)
        return nn.Sequential(COMPUTED[kind]()).eval().to(dtype)

    base, x = build(), torch.randn(3, 6, dtype=dtype)
    model = get_peft_model(build(), settings(target_modules=targets)).eval()
    assert targeted(model) == {name for name, _ in base.named_parameters()}
    with torch.no_grad():
        assert torch.equal(model(x), base.requires_grad_(False)(x))
        move(model, size=0.5)
        moved = model(x)
        assert not torch.allclose(moved, base(x), rtol=0.1, atol=0.1)
        torch.testing.assert_close(model.merge_and_unload()(x), moved, rtol=5e-2, atol=5e-2)


def test_a_parametrised_target_is_named_with_what_computes_it():
    base = nn.Sequential(OrderedDict(fc=parametrizations.weight_norm(nn.Linear(6, 6))))
    with refused(base, "`fc` is without `fc.parametrizations.weight`; add that to `target_modules`"):
        get_peft_model(base, settings(target_modules=["fc"]))
    model = get_peft_model(base, settings(target_modules=["fc"], parameters=["bias"], d=2))
    assert targeted(model) == {"fc.bias"}


@pytest.mark.parametrize("changes", [{}, {"coordinates": "low_rank", "rank": 2, "parameters": ["weight"]}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@torch.no_grad()
def test_hooks_on_the_base_module_see_the_whole_output_once(changes, dtype):
    base = nn.Sequential(nn.Linear(4, 4)).to(dtype)
    model = get_peft_model(base, settings(**changes)).eval()
    move(model, size=0.5)
    x, seen = torch.randn(2, 4, dtype=dtype), []
    expected = model(x)
    inner = model.base_model.model[0].base_layer
    inner.register_forward_hook(lambda module, args, output: seen.append(output))
    inner.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    torch.testing.assert_close(model(x / 2), expected, rtol=2e-2, atol=2e-2)
    assert len(seen) == 1
    assert torch.equal(model(x / 2), seen[0])
