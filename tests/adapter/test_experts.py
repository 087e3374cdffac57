"""Mixtures of experts: stacked weights are targets, by their own names and by those of the Linears they were."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from subspace_peft.adapter.walk import find_vectors, unique_coordinates
from tests.cases import (
    Case,
    base_outputs,
    close,
    dense_P,
    loss,
    move,
    moved_base,
    outputs,
    refused,
    settings,
    theta_d,
    tokens,
    wrap,
)
from tests.models import SMALL, TEXT


SIZES = {**TEXT, **SMALL, "num_key_value_heads": 1, "max_position_embeddings": 32, "num_experts_per_tok": 2}
SIZES |= {"intermediate_size": 8, "num_hidden_layers": 1}


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=3))


def qwen3_moe() -> nn.Module:
    """A layer of experts after one without."""
    sizes = {**SIZES, "num_hidden_layers": 2, "num_experts": 3, "moe_intermediate_size": 8, "head_dim": 4}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, mlp_only_layers=[0]))


def gpt_oss() -> nn.Module:
    """Experts with biases, stored [experts, inputs, outputs]."""
    sizes = {**SIZES, "num_local_experts": 3, "head_dim": 4, "rope_parameters": {"rope_type": "default"}}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, layer_types=["full_attention"]))


CASES = {
    build.__name__: Case(build.__name__, build, tokens(3, 5, below=23)) for build in (mixtral, qwen3_moe, gpt_oss)
}
CASE = CASES["mixtral"]
MOE = "model.layers.0.mlp."
STACKS = {f"{MOE}experts.gate_up_proj", f"{MOE}experts.down_proj"}
LOW_RANK = {"coordinates": "low_rank", "rank": 3, "projection": "identity", "d": None}


def moved(model: nn.Module, adapter: str = "default") -> set[str]:
    return set(unique_coordinates(model, adapter))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", CASES)
def test_the_experts_move_in_every_implementation(name, implementation):
    case = Case(name, lambda: _implemented(CASES[name].build(), implementation), CASES[name].inputs)
    model = wrap(case, target_modules="all-linear")
    assert torch.equal(outputs(model, case), base_outputs(case))
    move(model)
    plain = moved_base(case, model).requires_grad_(True)
    close(outputs(model, case), outputs(plain, case), atol=1e-5)
    loss(model, case.batch()).backward()
    loss(plain, case.batch()).backward()
    expected = sum(P.mT @ plain.get_parameter(name).grad.flatten() for name, P in dense_P(model).items())
    close(theta_d(model).grad, expected, atol=1e-5, rtol=1e-4)
    close(outputs(model.merge_and_unload(), case), outputs(plain, case), atol=1e-5)


def _implemented(model: nn.Module, implementation: str) -> nn.Module:
    model.set_experts_implementation(implementation)
    return model


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # of LoRA
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_all_linear_moves_what_lora_moves_and_the_linears_it_drops(name):
    case = CASES[name]
    ours = moved(wrap(case, target_modules="all-linear"))
    lora = get_peft_model(case.model(), LoraConfig(r=2, target_modules="all-linear"))
    keys = {key.removeprefix("base_model.model.") for key, _ in lora.named_parameters() if "lora_A" in key}
    modules = {key.split(".lora_A")[0].replace(".base_layer", "") for key in keys}
    assert {key.rpartition(".")[0] for key in ours} >= modules
    linears = {
        f"{key}.weight" for key, m in case.model().named_modules() if isinstance(m, nn.Linear) and key != "lm_head"
    }
    assert {key for key in ours if "experts" not in key and not key.endswith("mlp.gate.weight")} == linears


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target_modules": ["w1", "w2", "w3"]}, STACKS),
        ({"target_modules": ["gate_proj", "up_proj", "down_proj"], "parameters": ["weight"]}, STACKS),
        ({"target_modules": ["down_proj"]}, {f"{MOE}experts.down_proj"}),
        ({"target_modules": r".*\.(w1|w3|gate)"}, {f"{MOE}gate.weight", f"{MOE}experts.gate_up_proj"}),
        ({"target_modules": r".*\.experts\.\d+\.w2"}, {f"{MOE}experts.down_proj"}),
        ({"target_modules": ["experts"]}, STACKS),
        (
            {"target_modules": ["w2", "q_proj"], "exclude_modules": ["experts"]},
            {"model.layers.0.self_attn.q_proj.weight"},
        ),
        ({"target_modules": ["w1", "w2", "w3"], "parameters": ["down_proj"]}, {f"{MOE}experts.down_proj"}),
        ({"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": []}, {f"{MOE}experts.gate_up_proj"}),
        (
            {"target_parameters": ["gate.weight"], "target_modules": ["v_proj"]},
            {f"{MOE}gate.weight", "model.layers.0.self_attn.v_proj.weight"},
        ),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_experts_go_by_old_and_new_names(changes, expected):
    assert moved(wrap(CASE, **changes)) == expected


def test_target_parameters_hold_whatever_parameters_says():
    changes = {"target_modules": ["router"], "parameters": ["bias"], "target_parameters": ["experts.down_proj"]}
    assert moved(wrap(CASES["gpt_oss"], d=2, **changes)) == {f"{MOE}router.bias", f"{MOE}experts.down_proj"}


def test_experts_are_excluded_by_the_names_of_their_linears():
    names = moved(wrap(CASES["qwen3_moe"], target_modules="all-linear", exclude_modules=["gate_proj", "down_proj"]))
    assert not any("experts" in name or "down_proj" in name for name in names)
    assert "model.layers.0.mlp.up_proj.weight" in names


def test_a_stacked_bias_is_a_bias():
    biases = moved(wrap(CASES["gpt_oss"], target_modules="all-linear", parameters=["bias"]))
    assert {f"{MOE}experts.gate_up_proj_bias", f"{MOE}experts.down_proj_bias", f"{MOE}router.bias"} < biases
    assert all(name.endswith("bias") for name in biases)


def test_vectors_leave_stacks_alone():
    for case in (CASE, CASES["gpt_oss"]):
        expected = {name for name, parameter in case.model().named_parameters() if parameter.dim() == 1}
        assert moved(wrap(case, target_modules="all", parameters="vectors")) == expected


def test_target_parameters_alone_need_no_default_target_modules():
    for named in ([], None):
        config = settings(target_modules=named, target_parameters=["experts.down_proj"])
        assert moved(get_peft_model(CASE.model(), config)) == {f"{MOE}experts.down_proj"}
    mlp = nn.Sequential(nn.Linear(4, 3))
    assert moved(get_peft_model(mlp, settings(target_modules=None, target_parameters=["0.weight"]))) == {"0.weight"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["w1", "w2"]}, "got w1 without w3; name both or neither"),
        (
            {"target_parameters": ["experts.up"], "target_modules": ["q_proj"]},
            "none is called `experts.up`; names near",
        ),
        ({"target_parameters": ["experts.down_proj"], "target_modules": [], **LOW_RANK, "rank": 9}, "`rank` .* 8 for"),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_wrong_names_and_ranks_are_refused(changes, message):
    model = CASE.model()
    with refused(model, message):
        get_peft_model(model, settings(**changes))


def test_target_parameters_are_a_list():
    with pytest.raises(ValueError, match="`target_parameters` must be a list of names"):
        settings(target_parameters="experts.down_proj")


@pytest.mark.parametrize("factors", [2, 3])
def test_each_expert_has_low_rank_factors_of_its_own(factors):
    model = wrap(CASE, target_modules=["w2"], factors=factors, **LOW_RANK)
    move(model, size=0.3)
    increment = unique_coordinates(model, "default")[f"{MOE}experts.down_proj"].increment
    increment = increment(find_vectors(model).normalised("default")).detach()
    assert increment.shape == (3, 8, 8)
    assert torch.linalg.matrix_rank(increment).tolist() == [3, 3, 3]
    assert torch.linalg.matrix_rank(increment.flatten(0, 1)) > 3
    plain = CASE.model()
    with torch.no_grad():
        plain.get_parameter(f"{MOE}experts.down_proj").add_(increment)
    close(outputs(model, CASE), outputs(plain, CASE), atol=1e-5)


def test_low_rank_experts_have_as_many_numbers_as_in_lora():
    lora = get_peft_model(CASE.model(), LoraConfig(r=3, target_modules=[], target_parameters=["experts.down_proj"]))
    ours = wrap(CASE, target_modules=[], target_parameters=["experts.down_proj"], **LOW_RANK)
    assert theta_d(ours).numel() == sum(p.numel() for p in lora.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "changes",
    [{"target_modules": "all-linear"}, {"target_modules": ["w2"]}, LOW_RANK],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_a_reloaded_adapter_has_the_same_targets(changes, tmp_path):
    model = wrap(CASE, **{"target_modules": ["w1", "w2", "w3"], **changes})
    move(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(CASE.model(), tmp_path).eval()
    assert moved(again) == moved(model)
    assert torch.equal(outputs(again, CASE), outputs(model, CASE))


def test_a_file_written_without_experts_gains_none(tmp_path):
    model = wrap(CASE, target_modules=["q_proj"])
    move(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["target_parameters"]
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "w2"]}))
    again = PeftModel.from_pretrained(CASE.model(), tmp_path).eval()
    assert torch.equal(outputs(again, CASE), outputs(model, CASE))


def test_a_file_without_target_parameters_reads_a_stack_as_one_matrix():
    config = wrap(CASE, target_modules=["experts"], parameters=["down_proj"]).peft_config["default"]
    older = settings(target_modules=["experts"], parameters=["down_proj"], fingerprint=config.fingerprint, **LOW_RANK)
    assert get_peft_model(CASE.model(), older).peft_config["default"].D == 3 * 3 + 3 * 64


def test_a_second_adapter_moves_the_experts_too():
    model = wrap(CASE, target_modules=["q_proj"])
    model.add_adapter("other", settings(target_modules="all-linear"))
    assert moved(model, "other") == moved(wrap(CASE, target_modules="all-linear"))
    assert moved(model) == {"model.layers.0.self_attn.q_proj.weight"}
