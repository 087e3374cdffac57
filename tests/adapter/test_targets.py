"""Targets: which tensors are theta, and errors that come before anything is touched."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from subspace_peft.adapter.walk import unique_coordinates
from tests.cases import BY_NAME, REPLACED, base_outputs, move, outputs, refused, settings, wrap
from tests.models import MLP, Bare


def moved(model, adapter="default") -> set[str]:
    return set(unique_coordinates(model, adapter))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target_modules": ["fc1"]}, ["fc1.bias", "fc1.weight"]),
        ({"target_modules": ["fc1"], "parameters": ["weight"]}, ["fc1.weight"]),
        ({"target_modules": ".*2", "parameters": ["bias"], "d": 2}, ["fc2.bias"]),
        ({"target_modules": "all", "exclude_modules": ["fc1"]}, ["fc2.bias", "fc2.weight"]),
        ({"target_modules": "all-linear", "parameters": ["weight"]}, ["fc1.weight", "fc2.weight"]),
        ({"target_modules": "all", "parameters": "vectors"}, ["fc1.bias", "fc2.bias"]),
        ({"target_modules": ".*1", "parameters": "vectors"}, ["fc1.bias"]),
    ],
    ids=str,
)
def test_names_expressions_and_shorthands(changes, expected):
    assert sorted(moved(wrap(BY_NAME["mlp"], **changes))) == expected


def test_all_finds_the_parameters_of_modules_with_children():
    assert {"scale.gain", "scale.shift", "scale.inner.weight"} < moved(wrap(BY_NAME["bare"]))
    vit = moved(wrap(BY_NAME["vit"]))
    assert vit == {name for name, _ in BY_NAME["vit"].model().named_parameters()}
    assert any(name.endswith("cls_token") for name in vit)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit", "convnet", "norms", "attention", "bare"])
def test_vectors_are_the_parameters_of_one_dimension(name):
    case = BY_NAME[name]
    vectors = {name for name, p in case.model().named_parameters() if p.dim() == 1}
    assert moved(wrap(case, target_modules="all", parameters="vectors")) == vectors


@pytest.mark.parametrize("name", ["bert", "llama", "convnet"])
def test_an_adapter_of_vectors_is_saved_loaded_and_merged(name, tmp_path):
    case = BY_NAME[name]
    model = wrap(case, target_modules="all", parameters="vectors", projection="kronecker")
    move(model)
    expected = outputs(model, case)
    assert not torch.equal(expected, base_outputs(case))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.model(), tmp_path).eval()
    assert moved(loaded) == moved(model)
    assert torch.equal(outputs(loaded, case), expected)
    torch.testing.assert_close(outputs(model.merge_and_unload(), case), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_vectors_on_another_base_is_told_by_the_tensor_that_differs(tmp_path):
    wrap(BY_NAME["mlp"], target_modules="all", parameters="vectors").save_pretrained(tmp_path)
    other = MLP()
    other.fc1.bias = None
    with refused(other, "the first target tensor that differs is `fc2.bias` of shape \\[4\\]"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("shorthand", ["all", "all-linear"])
def test_shorthands_leave_out_modules_without_such_a_parameter(shorthand):
    """The embeddings of BERT and one Linear here have no bias."""
    model = BY_NAME["bert"].model()
    model.get_submodule("bert.encoder.layer.0.attention.self.query").bias = None
    biases = moved(get_peft_model(model, settings(target_modules=shorthand, parameters=["bias"])))
    assert len(biases) > 5
    assert all(name.endswith(".bias") for name in biases)
    assert "bert.encoder.layer.0.attention.self.query.bias" not in biases


def test_torchs_attention_is_named_with_its_out_proj_unless_that_is_excluded():
    """It reads the parameters of that child and never calls it."""
    own = {"packed.in_proj_weight", "packed.in_proj_bias"}
    outputs = {"packed.out_proj.weight", "packed.out_proj.bias"}
    model = wrap(BY_NAME["attention"], target_modules=["packed"])
    model.add_adapter("other", settings(target_modules=["packed"]))
    assert moved(model) == moved(model, "other") == own | outputs
    assert moved(wrap(BY_NAME["attention"], target_modules=["packed"], exclude_modules=["packed.out_proj"])) == own
    alone = wrap(BY_NAME["attention"], target_modules=["packed"], parameters=["out_proj.weight"])
    assert moved(alone) == {"packed.out_proj.weight"}


def test_all_linear_leaves_out_the_output_layer():
    assert not any("lm_head" in name for name in moved(wrap(BY_NAME["llama"], target_modules="all-linear")))
    bert = moved(wrap(BY_NAME["bert"], target_modules="all-linear"))
    assert any("query" in name for name in bert)


@pytest.mark.parametrize("parameters", [["out_proj.weight"], "vectors", None])
def test_a_second_adapter_finds_the_output_of_torchs_attention(parameters):
    changes = {"target_modules": "all", "parameters": parameters}
    model = wrap(BY_NAME["attention"], **changes)
    model.add_adapter("other", settings(**changes))
    assert moved(model, "other") == moved(model)


def test_the_output_of_torchs_attention_can_be_saved_whole():
    changes = {"target_modules": "all", "parameters": "vectors", "modules_to_save": ["packed.out_proj"]}
    model = wrap(BY_NAME["attention"], **changes)
    model.add_adapter("other", settings(**changes))
    assert moved(model, "other") == moved(model)
    assert "packed.in_proj_bias" in moved(model)
    assert "packed.out_proj.bias" not in moved(model)


def test_a_norm_that_is_computed_is_named_with_what_it_is_computed_from():
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4))
    register_parametrization(model[0], "weight", nn.Identity())
    with refused(
        model, "named with what its parameters are computed from, `0` is without `0.parametrizations.weight`"
    ):
        get_peft_model(model, settings(target_modules=["0"], parameters="vectors"))
    found = moved(get_peft_model(model, settings(target_modules="all", parameters="vectors")))
    assert found == {"0.parametrizations.weight.original", "0.bias", "1.bias"}


def test_layers_to_transform():
    model = wrap(BY_NAME["llama"], target_modules=["q_proj"], layers_to_transform=[1])
    assert moved(model) == {"model.layers.1.self_attn.q_proj.weight"}


@pytest.mark.parametrize("shorthand", ["all", "all-linear"])
@pytest.mark.parametrize("name", ["mlp", "llama", "vit", "bare"])
def test_a_second_adapter_finds_the_same_targets(name, shorthand):
    case = BY_NAME[name]
    model = wrap(case, target_modules=shorthand)
    model.add_adapter("other", settings(target_modules=shorthand, seed=1, d=5))
    assert moved(model, "other") == moved(model)


@pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning")
def test_a_tied_weight_is_one_tensor_with_its_first_name():
    model = wrap(BY_NAME["tied"], target_modules=["out"])
    assert moved(model) == {"tokens.weight"}
    assert model.peft_config["default"].D == 44


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["fc3"]}, "not found in the base model.*names near to it.*fc1"),
        ({"target_modules": ["nothing_like_it"]}, "not found in the base model|No modules were targeted"),
        (
            {"target_modules": ["fc1"], "exclude_modules": ["fc1"]},
            "must leave a module that `target_modules` = {'fc1'} names, {'fc1'} leaves none; exclude fewer",
        ),
        ({"target_modules": ["act"]}, "`act` owns none"),
        ({"parameters": ["wieght"]}, "none owns `wieght`; names near to it: weight"),
        ({"target_modules": ["act"], "parameters": "vectors"}, "own parameters of one dimension: `act` owns none"),
        ({"parameters": ["weight", "bais"]}, "none owns `bais`; names near to it: bias\\."),
        ({"target_modules": "all-linear", "d": 115}, "`d` must be at most the D = 114 adapted entries"),
        ({"d": 115}, "`d` must be at most the D = 114 adapted entries, got 115; lower `d` or widen"),
        ({"projection": "identity", "d": 7}, "has d = D = 114, got d = 7; leave `d` out"),
        ({"coordinates": "low_rank", "rank": 5}, "`rank` must be at most the smaller dimension, 4 for `fc2.weight`"),
        ({"coordinates": "low_rank", "rank": 1, "parameters": ["bias"]}, "two or more dimensions, found none"),
        ({"projection": "basis", "d": None}, "`basis` is needed"),
        ({"projection": "coordinate", "d": None}, "`mask` is needed"),
        ({"projection": "basis"}, "`basis` is needed"),
        ({"projection": "coordinate"}, "`mask` is needed"),
    ],
    ids=str,
)
def test_errors_come_before_anything_is_touched(changes, message):
    torch.manual_seed(0)
    model = MLP()
    model.act = nn.Tanh()
    config = settings(**changes)
    asked = {name: getattr(config, name) for name in ("target_modules", "d", "D", "fingerprint")}
    with refused(model, message):
        get_peft_model(model, config)
    assert {name: getattr(config, name) for name in asked} == asked
    assert all(p.requires_grad for p in model.parameters())


def test_quantised_weights_are_refused():
    model = MLP()
    model.fc1.weight = nn.Parameter(torch.ones(10, 6, dtype=torch.int8), requires_grad=False)
    with refused(model, "`fc1.weight` is a Parameter of torch.int8 in a Linear"):
        get_peft_model(model, settings())
    get_peft_model(model, settings(exclude_modules=["fc1"]))
    model = MLP()
    model.fc1.weight = nn.Parameter(torch.ones(10, 6).to(torch.float8_e4m3fn), requires_grad=False)
    with refused(model, "`fc1.weight` is a Parameter of torch.float8_e4m3fn in a Linear"):
        get_peft_model(model, settings())


def test_complex_and_lazy_tensors_are_refused_by_name():
    model = MLP()
    model.fft = nn.Module()
    model.fft.kernel = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with refused(model, "must be real: `fft.kernel` is torch.complex64"):
        get_peft_model(model, settings())
    get_peft_model(model, settings(exclude_modules=["fft"]))
    for shorthand in ("all", "all-linear"):
        with pytest.raises(
            ValueError, match="`1.weight` of a LazyLinear gets one at the first forward; run the model"
        ):
            get_peft_model(nn.Sequential(MLP(), nn.LazyLinear(3)), settings(target_modules=shorthand))
    lazy = nn.Sequential(nn.LazyLinear(3), nn.LayerNorm(3))
    with pytest.raises(ValueError, match="`0.weight` of a LazyLinear gets one at the first forward"):
        get_peft_model(lazy, settings(target_modules="all", parameters="vectors"))


def test_a_root_that_owns_parameters_is_refused_by_all():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.inner = nn.Parameter(torch.ones(2)), nn.Linear(2, 2)

    with pytest.raises(ValueError, match="the model itself owns \\['gain'\\]"):
        get_peft_model(Root(), settings(d=1))
    assert moved(get_peft_model(Root(), settings(d=1, parameters=["bias"]))) == {"inner.bias"}


def test_a_module_with_another_methods_adapter_is_refused():
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["fc1"]), MLP())
    del model.peft_config
    with (
        pytest.warns(UserWarning, match="for a second time"),
        pytest.raises(ValueError, match="adapters of one PEFT type: `fc1`"),
    ):
        get_peft_model(model, settings())


def test_a_failing_second_adapter_leaves_the_first():
    case = BY_NAME["bare"]
    model = wrap(case)
    with refused(model, "at most the D"):
        model.add_adapter("other", settings(d=10_000))
    assert moved(model) == {name for name, _ in Bare().named_parameters()}
    model.add_adapter("other", settings(d=5))


def test_an_embedding_that_rewrites_its_weight_is_refused():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0))
    with pytest.raises(ValueError, match="max_norm"):
        get_peft_model(model, settings())
    assert type(model[0]) is nn.Embedding


def partitioned(name: str) -> nn.Module:
    """As DeepSpeed's ZeRO-3 does it: each parameter has an id and its shape, and torch an empty tensor."""
    model = BY_NAME[name].model()
    for parameter in model.parameters():
        parameter.ds_id, parameter.ds_shape, parameter.data = 0, parameter.shape, torch.empty(0)
    return model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [*((name, None) for name in ("convnet", "padded", "tied", "llama")), ("convnet", "vectors"), ("llama", "vectors")],
)
def test_tensors_that_zero_3_has_partitioned_have_the_same_P(name, parameters):
    """tests/test_sharded.py trains them."""
    config = get_peft_model(partitioned(name), settings(parameters=parameters)).peft_config["default"]
    whole = wrap(BY_NAME[name], parameters=parameters).peft_config["default"]
    assert (config.D, config.fingerprint) == (whole.D, whole.fingerprint)


def test_a_weight_that_zero_3_has_partitioned_is_not_replaced():
    model, changes = partitioned("mlp"), {**REPLACED, "target_modules": ["fc1"]}
    with refused(model, "must be whole to be replaced: `fc1.weight` is partitioned by .* ZeRO-3, .*; use ZeRO-2"):
        get_peft_model(model, settings(**changes))


@torch.no_grad()
def test_a_second_adapter_inside_what_the_first_wraps():
    """PEFT passes over the submodules of a wrapped module; here each is found by its name in the base model."""
    case = BY_NAME["bare"]
    model, alone = wrap(case, target_modules=["scale"], d=3), wrap(case, target_modules=["inner"])
    model.add_adapter("other", settings(target_modules=["inner"]))
    model.set_adapter("other")
    assert moved(model) == {"scale.gain", "scale.shift"}
    assert moved(model, "other") == moved(alone) == {"scale.inner.weight", "scale.inner.bias"}
    move(model, "other")
    move(alone)
    assert torch.equal(outputs(model, case), outputs(alone, case))
    with refused(model, "not found in the base model"):
        model.add_adapter("third", settings(target_modules=["outer_space"]))
    model.set_adapter("default")
    model.delete_adapter("other")
    with model.disable_adapter():
        assert torch.equal(outputs(model, case), base_outputs(case))
