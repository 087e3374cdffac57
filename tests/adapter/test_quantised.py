"""Quantised bases: theta_d trains around the weights of bitsandbytes and torchao as around the dequantised ones."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from subspace_peft import SubspaceConfig, compress
from subspace_peft.adapter.full_space import full_space
from subspace_peft.adapter.quantised import keep_unpacked
from subspace_peft.adapter.walk import named_layers
from subspace_peft.projections import PROJECTIONS
from subspace_peft.spectra.matrices import matrices
from tests.adapter.quantised import KINDS, MODEL, WEIGHT_ONLY, bnb, dequantised, quantised, weight_of, x
from tests.cases import loss, move, refused, theta_d, tree


CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LOW_RANK = {"coordinates": "low_rank", "rank": 4}
VECTORS = {"parameters": "vectors", "target_modules": "all"}
BIASES = {"parameters": ["bias"], "target_modules": ["fc1", "fc2"]}


def wrap(model: nn.Module, **changes) -> PeftModel:
    config = SubspaceConfig(**{"d": 9, "projection": "fastjl", "target_modules": ["fc1", "fc2", "out"], **changes})
    return get_peft_model(model, config)


def moved(model: nn.Module, **changes) -> PeftModel:
    model = wrap(model, **changes)
    move(model)
    return model


def gradient(model: nn.Module) -> torch.Tensor:
    theta_d(model).grad = None
    loss(model, x()).backward()
    return theta_d(model).grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_theta_d_of_zero_is_the_base_bit_for_bit(kind, mode):
    for changes in ({}, LOW_RANK):
        base, model = quantised(kind).train(mode), wrap(quantised(kind), **changes).train(mode)
        keep_unpacked(base)
        with torch.set_grad_enabled(mode):
            assert torch.equal(model(x()), base.requires_grad_(False)(x()))


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_those_of_the_plain_model(kind):
    config = wrap(quantised(kind)).peft_config["default"]
    plain = wrap(MODEL()).peft_config["default"]
    assert (config.D, config.fingerprint) == (plain.D, plain.fingerprint)


@pytest.mark.parametrize("kind", WEIGHT_ONLY)
@pytest.mark.parametrize(
    "changes",
    [{}, {"projection": "kronecker"}, LOW_RANK, {**LOW_RANK, "factors": 3}, VECTORS],
    ids=["weight", "kronecker", "low_rank", "three", "vectors"],
)
def test_outputs_and_gradient_are_those_on_the_dequantised_base(kind, changes):
    model, plain = moved(quantised(kind), **changes), moved(dequantised(kind), **changes)
    torch.testing.assert_close(model(x()), plain(x()), **CLOSE)
    torch.testing.assert_close(gradient(model), gradient(plain), **CLOSE)


@pytest.mark.parametrize("projection", [p for p in PROJECTIONS if p not in ("basis", "coordinate")])
def test_every_projection_has_the_gradient_on_the_dequantised_base(projection):
    changes = {"projection": projection, "d": None if projection == "identity" else 9}
    model, plain = moved(quantised("4-bit"), **changes), moved(dequantised("4-bit"), **changes)
    torch.testing.assert_close(gradient(model), gradient(plain), **CLOSE)


def test_a_gradient_passes_quantised_activations():
    """torchao gives none to their input; that of the weight which is used is right but for the rounding."""
    model, plain = moved(quantised("int8, activations too")), moved(dequantised("int8, activations too"))
    torch.testing.assert_close(model(x()), plain(x()), rtol=0.02, atol=0.02)
    expected = gradient(plain)
    assert (gradient(model) - expected).norm() < 0.02 * expected.norm()


def test_norms_and_biases_have_a_gradient_through_quantised_activations():
    """torchao gives none to the input of a Linear, and no adapter moves one that has no bias."""
    model, plain = MODEL(), MODEL()
    for each in (model, plain):
        each.fc1.bias = each.fc2.bias = None
    KINDS["int8, activations too"](model)
    for name in ("fc1", "fc2", "out"):
        plain.get_submodule(name).weight.data = weight_of(model.get_submodule(name))
    norms = {"projection": "identity", "d": None, **VECTORS}
    model, plain = moved(model, **norms), moved(plain, **norms)
    expected = gradient(plain)
    assert (gradient(model) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_neither_evaluation_nor_a_state_dict_changes_the_base_or_its_gradient(kind):
    """Some CPUs have 4-bit weights packed for an evaluation, which a base of its own does not survive."""
    model = moved(quantised(kind))
    expected = gradient(model).clone()
    with torch.no_grad():
        model.eval()(x())
        with model.disable_adapter():
            model(x())
    model.state_dict()
    assert torch.equal(gradient(model.train()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_was_evaluated_can_be_wrapped(kind):
    base, expected = quantised(kind).eval(), gradient(moved(quantised(kind)))
    with torch.no_grad():
        base(x())
    actual = gradient(moved(base).train())
    assert (actual - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_is_read_is_the_moved_dequantised_one(kind):
    model, plain = moved(quantised(kind)), moved(dequantised(kind))
    for (_, layer), (_, expected) in zip(named_layers(model), named_layers(plain), strict=True):
        weight = layer.weight
        assert (weight.shape, weight.dtype, weight.device) == (expected.weight.shape, torch.float32, x().device)
        torch.testing.assert_close(weight + 0, expected.weight + 0, **CLOSE)
    model.fc2.weight.square().sum().backward()
    plain.fc2.weight.square().sum().backward()
    torch.testing.assert_close(theta_d(model).grad, theta_d(plain).grad, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("changes", [{}, LOW_RANK], ids=["weight", "low_rank"])
def test_an_adapter_is_loaded_onto_the_quantised_and_the_plain_base(kind, changes, tmp_path):
    model = moved(quantised(kind), **changes)
    model.save_pretrained(tmp_path)
    expected = model(x())
    assert torch.equal(PeftModel.from_pretrained(quantised(kind), tmp_path).train()(x()), expected)
    plain = PeftModel.from_pretrained(dequantised(kind), tmp_path)
    torch.testing.assert_close(plain(x()), expected, rtol=0.02, atol=0.02)
    plain.save_pretrained(tmp_path / "plain")
    back = PeftModel.from_pretrained(quantised(kind), tmp_path / "plain").train()
    assert torch.equal(back(x()), expected)


@pytest.mark.parametrize("kind", WEIGHT_ONLY)
@pytest.mark.parametrize("start", ["svd", "orthogonal"])
def test_a_replaced_weight_starts_from_the_dequantised_one(kind, start):
    changes = {**LOW_RANK, "replace_weight": True, "start": start, "parameters": ["weight"]}
    model, plain = moved(quantised(kind), **changes).eval(), moved(dequantised(kind), **changes).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x()), plain(x()), rtol=1e-3, atol=1e-3)
        merged, expected = model.merge_and_unload(), plain.merge_and_unload()
        torch.testing.assert_close(merged(x()), expected(x()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["4-bit", "int8"])
def test_in_half_precision_theta_d_and_its_gradient_are_float32(kind):
    model = moved(quantised(kind, torch.bfloat16))
    assert model(x(torch.bfloat16)).dtype == torch.bfloat16
    loss(model, x(torch.bfloat16)).backward()
    expected = gradient(moved(dequantised(kind)))
    assert theta_d(model).grad.dtype == torch.float32
    assert (theta_d(model).grad - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_an_increment_below_the_bases_resolution_acts(kind):
    model = wrap(quantised(kind, torch.bfloat16), parameters=["weight"]).eval()
    layer = model.fc1
    with torch.no_grad():
        base = layer(x(torch.bfloat16))
        move(model, size=0.3)
        increment = x() @ layer.get_delta_weight("default").T
        difference = (layer(x(torch.bfloat16)) - base).float()
    assert (difference - increment).norm() < 0.1 * increment.norm()


@pytest.mark.parametrize("kind", ["4-bit", "8-bit", "int8"])
def test_biases_move_and_samples_of_a_batch_have_adapters_of_their_own(kind):
    model, plain = moved(quantised(kind), **BIASES), moved(dequantised(kind), **BIASES)
    torch.testing.assert_close(model(x()), plain(x()), **CLOSE)
    model.add_adapter("other", SubspaceConfig(d=5, target_modules=["fc2"]))
    move(model, "other")
    names = ["default", "other", "__base__", "other", "default"]
    with torch.no_grad():
        mixed = model.eval()(x(), adapter_names=names)
        for name, rows in (("default", [0, 4]), ("other", [1, 3])):
            model.set_adapter(name)
            torch.testing.assert_close(mixed[rows], model(x())[rows], rtol=1e-2, atol=1e-2)


def test_spectra_are_those_of_the_dequantised_weights():
    expected = dict(matrices(moved(dequantised("4-bit, stored as bfloat16"))))
    for name, matrix in matrices(moved(quantised("4-bit, stored as bfloat16"))):
        torch.testing.assert_close(matrix, expected.pop(name))
    assert not expected


# torch.compile instantiates the autograd functions of bitsandbytes
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["4-bit", "4-bit, stored as bfloat16", "8-bit", "int8", "int4"])
def test_the_model_compiles_without_a_break_of_the_graph(kind):
    model = moved(quantised(kind))
    expected = gradient(model).clone()
    theta_d(model).grad = None
    torch._dynamo.reset()
    loss(torch.compile(model, backend="aot_eager", fullgraph=True), x()).backward()
    torch.testing.assert_close(theta_d(model).grad, expected, **CLOSE)


def test_a_copy_of_the_model_computes_the_same():
    model = moved(quantised("4-bit"))
    assert torch.equal(copy.deepcopy(model)(x()), model(x()))


def test_what_cannot_be_is_refused_by_name():
    embeddings = nn.Sequential(bnb.nn.Embedding4bit(64, 64), nn.Linear(64, 64)).to("cpu")
    shape = tree(embeddings)
    with pytest.raises(ValueError, match="`0.weight` is a Params4bit of torch.uint8 in a Embedding4bit"):
        get_peft_model(embeddings, SubspaceConfig(d=3, target_modules="all"))
    assert tree(embeddings) == shape
    model = wrap(quantised("4-bit"), **LOW_RANK, replace_weight=True)
    with refused(model, "`fc1.weight` is not; load the adapter onto the unquantised base"):
        compress(model)
    columns = torch.linalg.qr(torch.randn(MODEL().fc2.weight.numel(), 2))[0]
    only = {"target_modules": ["fc2"], "parameters": ["weight"]}
    model = wrap(quantised("4-bit"), d=2, projection="basis", normalization="columns", basis=columns, **only)
    with refused(model, "`fc2.weight` is quantised; convert it, or load it so"):
        full_space(model)
    model = wrap(quantised("4-bit, stored as bfloat16"))
    with pytest.raises(ValueError, match="must stay the same, `weight` of Linear4bit"), torch.no_grad():
        model.fc1.weight = nn.Parameter(torch.zeros(128, 64))
