"""Bases that accelerate spreads and offloads, and models whose tensors have no values at first."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from subspace_peft import SubspaceConfig
from tests.cases import BY_NAME, close, loss, move, outputs, settings, theta_d, wrap


THETA_D = "subspace_vectors.subspace_peft_theta_d.default.vector"
LLAMA, MLP = BY_NAME["llama"], BY_NAME["mlp"]
KINDS = [
    {"projection": "fastjl"},
    {"projection": "kronecker"},
    {"projection": "sparse"},
    {"coordinates": "low_rank", "rank": 2},
]


def config(changes: dict) -> SubspaceConfig:
    return settings(**with_linear(changes))


def with_linear(changes: dict) -> dict:
    return {"target_modules": "all-linear", **changes}


def gradient(model: nn.Module, case=LLAMA) -> torch.Tensor:
    theta_d(model).grad = None
    loss(model, case.batch()).backward()
    return theta_d(model).grad.clone()


def check(model: nn.Module, plain: nn.Module) -> None:
    """Outputs and gradients are those of the plain model, and a step of training moves both alike."""
    for each in (model, plain):
        move(each)
    close(outputs(model, LLAMA), outputs(plain, LLAMA), atol=1e-6)
    close(gradient(model), gradient(plain), atol=1e-5)
    for each in (model, plain):
        torch.optim.SGD([theta_d(each)], lr=0.1).step()
    close(outputs(model, LLAMA), outputs(plain, LLAMA), atol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    LLAMA.model().save_pretrained(folder)
    return folder


def device_map(model: nn.Module, elsewhere: str) -> dict:
    places = {name: "cpu" for name, _ in model.model.named_children() if name != "layers"}
    layers = {f"model.layers.{i}": elsewhere if i else "cpu" for i in range(len(model.model.layers))}
    return {**{f"model.{name}": place for name, place in places.items()}, **layers, "lm_head": elsewhere}


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_weights_on_disk(changes, folder, tmp_path):
    base = LLAMA.model()
    base = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map(base, "disk"), offload_folder=tmp_path, dtype=torch.float32
    )
    assert any(parameter.device.type == "meta" for parameter in base.parameters())
    check(get_peft_model(base, config(changes)).eval(), wrap(LLAMA, **with_linear(changes)))


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_weights_in_host_memory(changes):
    """As beside a GPU: a device that holds some layers, and a state dict that holds the others."""
    base = LLAMA.model()
    places = device_map(base, "cpu")
    base = dispatch_model(base, places, main_device="cpu", force_hooks=True)
    check(get_peft_model(base, config(changes)).eval(), wrap(LLAMA, **with_linear(changes)))


def wide(dtype: torch.dtype) -> nn.Sequential:
    """Layers so wide that x runs through the steps of P."""
    torch.manual_seed(0)
    layers = nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512, bias=False)
    return nn.Sequential(nn.Embedding(20, 512), *layers).to(dtype)


@pytest.mark.parametrize("where", ["host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_every_weight_is_offloaded(changes, dtype, where, tmp_path):
    """The first target too: theta_d is where the layers run."""
    targets = SubspaceConfig(d=40, target_modules=["0", "1", "3"], init_weights=False, **changes)
    plain, base, device = get_peft_model(wide(dtype), targets).eval(), wide(dtype), torch.device("cpu")
    cpu_offload(base, device) if where == "host" else disk_offload(base, tmp_path / "base", device)
    plain.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    x = torch.arange(20).unflatten(0, (4, 5))
    for each in (model, plain):
        each(x).float().square().mean().backward()
    assert [name for name, parameter in base.named_parameters() if not parameter.is_meta] == [THETA_D]
    assert torch.equal(model(x), plain(x))
    assert torch.equal(theta_d(model).grad, theta_d(plain).grad)
    names = ["default", "__base__", "__base__", "default"]
    assert torch.equal(model(x, adapter_names=names), plain(x, adapter_names=names))
    layer, twin = (each.base_model.model[1] for each in (model, plain))
    assert torch.equal(layer.get_delta_weight("default"), twin.get_delta_weight("default"))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_a_tied_tensor_that_is_offloaded_is_refused():
    base = LlamaForCausalLM(LlamaConfig(**LLAMA.model().config.to_dict() | {"tie_word_embeddings": True}))
    cpu_offload(base, torch.device("cpu"))
    with pytest.raises(ValueError, match="A tied tensor must be one .* offloads `model.embed_tokens.weight`"):
        get_peft_model(base, SubspaceConfig(d=4, target_modules=["embed_tokens"]))
    assert get_peft_model(base, SubspaceConfig(d=4, target_modules="all-linear")).peft_config["default"].D


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_low_cpu_mem_usage(changes, tmp_path):
    """theta_d has no values until a file is read; P needs none."""
    plain = wrap(MLP, **with_linear(changes))
    move(plain)
    empty = get_peft_model(MLP.model(), config(changes), low_cpu_mem_usage=True).eval()
    assert theta_d(empty).is_meta
    set_peft_model_state_dict(empty, get_peft_model_state_dict(plain), low_cpu_mem_usage=True)
    assert torch.equal(outputs(empty, MLP), outputs(plain, MLP))
    plain.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MLP.model(), tmp_path, low_cpu_mem_usage=True, is_trainable=True).eval()
    assert torch.equal(outputs(loaded, MLP), outputs(plain, MLP))
    close(gradient(loaded, MLP), gradient(plain, MLP))


def test_an_adapter_on_a_base_without_values(tmp_path):
    """Wrapped on the meta device, then filled from the state dict of a wrapped model."""
    plain = wrap(MLP, **with_linear(KINDS[0]))
    move(plain)
    with init_empty_weights():
        empty = get_peft_model(copy.deepcopy(MLP.model()).to("meta"), config(KINDS[0])).eval()
    assert empty.peft_config["default"].fingerprint == plain.peft_config["default"].fingerprint
    empty.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(outputs(empty, MLP), outputs(plain, MLP))
    empty.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys()


def test_a_merged_adapter_takes_no_file():
    """Unmerging would take the increment of the file away, which was never added."""
    model, other = wrap(MLP), wrap(MLP)
    move(model)
    move(other, size=2)
    model.merge_adapter()
    before = outputs(model, MLP)
    with pytest.raises(ValueError, match="must be unmerged to be loaded, 'default' is merged; call unmerge_adapter"):
        set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert torch.equal(outputs(model, MLP), before)
    model.unmerge_adapter()
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    close(outputs(model, MLP), outputs(other, MLP), atol=1e-5)
