"""replace_weight: W = B A in place of W_0, as an adapter; and factors of increments, as LoRA has them."""

import dataclasses

import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from subspace_peft import SubspaceConfig
from subspace_peft.adapter_file import unique_coordinates
from subspace_peft.starts import STARTS
from tests.cases import (
    BY_NAME,
    Allocations,
    assert_same_state,
    base_outputs,
    loss,
    move,
    outputs,
    tensors,
    theta_d,
    train,
    wrap,
)
from tests.cases import run as run_model


REPLACED = {"coordinates": "low_rank", "rank": 2, "replace_weight": True, "parameters": ["weight"], "d": 9}
TARGETS = {
    "mlp": ["fc1", "fc2"],
    "convnet": ["conv1", "head"],
    "embeddings": ["tokens", "mix"],
    "tied": "all",
    "gpt2": ["c_attn", "c_fc", "wte"],
    "llama": "all-linear",
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
pytestmark = pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning", "ignore:Setting .save_embedding_layers")


def replaced(name, **changes):
    return wrap(BY_NAME[name], **{**REPLACED, "target_modules": TARGETS[name], **changes})


@torch.no_grad()
def dense(name, model):
    """A plain model of the case that holds the products."""
    plain = BY_NAME[name].model()
    z = model.base_model.model.subspace_vectors.normalised("default")
    for path, coordinates in unique_coordinates(model, "default").items():
        left, right = coordinates.factors(z)
        parameter = plain.get_parameter(path)
        parameter.copy_((left @ right).view(parameter.shape))
    return plain


@pytest.mark.parametrize("factors", [2, 3])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["mlp", "convnet", "embeddings", "tied", "gpt2", "llama"])
def test_the_weight_is_the_product(name, start, factors):
    model, case = replaced(name, start=start, factors=factors), BY_NAME[name]
    torch.testing.assert_close(outputs(model, case), outputs(dense(name, model), case), **CLOSE)
    move(model, size=0.3)
    expected = outputs(dense(name, model), case)
    torch.testing.assert_close(outputs(model, case), expected, **CLOSE)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, case), expected, **CLOSE)


@pytest.mark.parametrize("factors", [2, 3])
@pytest.mark.parametrize("name", ["mlp", "convnet", "gpt2"])
def test_a_weight_of_that_rank_is_left_as_it_is(name, factors):
    """The truncated SVD of a weight whose rank is the factors' is the weight."""
    case, plain = BY_NAME[name], BY_NAME[name].model()
    targets = unique_coordinates(replaced(name), "default")
    with torch.no_grad():
        for path in targets:
            weight = plain.get_parameter(path)
            U, S, Vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
            weight.copy_((U[:, :2] * S[:2] @ Vh[:2]).view(weight.shape))
    expected = outputs(plain, case)
    config = SubspaceConfig(**{**REPLACED, "target_modules": TARGETS[name], "factors": factors})
    torch.testing.assert_close(outputs(get_peft_model(plain, config).eval(), case), expected, **CLOSE)


@pytest.mark.parametrize("name", ["mlp", "convnet", "embeddings"])
def test_every_number_of_theta_d_has_a_gradient(name):
    for changes in ({}, {"replace_weight": False}, {"replace_weight": False, "factors": 3}, {"factors": 3}):
        model = replaced(name, **changes)
        loss(model, BY_NAME[name].batch()).backward()
        assert (theta_d(model).grad != 0).all()


@pytest.mark.parametrize("name", ["mlp", "convnet", "embeddings", "llama"])
def test_three_factors_of_an_increment_start_at_the_base(name):
    case = BY_NAME[name]
    model = replaced(name, replace_weight=False, factors=3)
    assert torch.equal(outputs(model, case), base_outputs(case))
    train(model, case)
    assert not torch.equal(outputs(model, case), base_outputs(case))


@pytest.mark.parametrize("changes", [{}, {"factors": 3, "gamma": 0.3}, {"factors": 3, "replace_weight": False}])
def test_gradient_by_differences(changes):
    case = BY_NAME["mlp"]
    model = replaced("mlp", **changes).double()
    x, vector, h = case.batch().double(), theta_d(model), 1e-6
    with torch.no_grad():
        vector.copy_(0.3 * torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    loss(model, x).backward()
    for i in range(9):
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                vector[i] += sign * h
                found.append(loss(model, x).item())
                vector[i] -= sign * h
        assert vector.grad[i].item() == pytest.approx((found[0] - found[1]) / (2 * h), rel=1e-4, abs=1e-6)


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


def test_a_layer_runs_as_two_smaller_ones():
    """Neither the product nor its gradient is formed, and the weight is not read."""
    model = get_peft_model(
        nn.Sequential(nn.Linear(400, 300)),
        SubspaceConfig(**{**REPLACED, "target_modules": ["0"], "projection": "identity", "d": None}),
    )
    x = torch.randn(2, 400)
    model(x).sum().backward()
    with torch.no_grad():
        model.base_model.model[0].base_layer.weight.fill_(torch.nan)
    with FlopCounterMode(display=False) as flops, Allocations() as allocations:
        model(x).sum().backward()
    assert theta_d(model).grad.isfinite().all()
    assert flops.get_total_flops() <= 3 * 2 * 2 * 2 * (400 + 300)
    assert allocations.peak < 4 * 300 * 400


@pytest.mark.parametrize("name", ["convnet", "tied", "gpt2"])
@pytest.mark.parametrize("start", STARTS)
def test_the_base_comes_back(start, name):
    case = BY_NAME[name]
    model = replaced(name, start=start)
    move(model)
    before, weights = outputs(model, case), tensors(model)
    with model.disable_adapter():
        assert torch.equal(outputs(model, case), base_outputs(case))
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, case), before, **CLOSE)
    with model.disable_adapter():
        assert torch.equal(outputs(model, case), base_outputs(case))
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same_state(model, weights)
    assert torch.equal(outputs(model, case), before)
    plain = model.unload()
    assert torch.equal(outputs(plain, case), base_outputs(case))


@pytest.mark.parametrize("projection", ["fastfood", "fastjl", "sparse", "dense", "identity"])
@pytest.mark.parametrize("start", STARTS)
def test_save_and_load(start, projection, tmp_path):
    case = BY_NAME["convnet"]
    changes = {"projection": projection, "d": None if projection == "identity" else 9}
    model = replaced("convnet", start=start, **changes)
    train(model, case)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(PeftModel.from_pretrained(case.model(), tmp_path).eval(), case), outputs(model, case))


@pytest.mark.parametrize("start", STARTS)
def test_the_start_is_that_of_the_file(start, tmp_path):
    """A base whose weights were rounded since, or singular vectors of another sign, change nothing."""
    case = BY_NAME["mlp"]
    model = replaced("mlp", start=start)
    move(model)
    model.save_pretrained(tmp_path)
    base = case.model()
    with torch.no_grad():
        base.fc1.weight.mul_(-1.5)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(outputs(loaded, case), outputs(model, case))


def test_a_file_without_the_start_is_refused(tmp_path):
    case = BY_NAME["mlp"]
    replaced("mlp").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    key = next(key for key in whole if "start.fc1" in key and key.endswith(".B"))
    save_file({k: t for k, t in whole.items() if "start.fc1" not in k}, file)
    with pytest.raises(ValueError, match="replaced weight start, for `fc1.weight` it does not"):
        PeftModel.from_pretrained(case.model(), tmp_path)
    save_file({**whole, key: whole[key][:3].clone()}, file)
    with pytest.raises(ValueError, match="start of `fc1.weight` in the adapter file must be"):
        PeftModel.from_pretrained(case.model(), tmp_path)
    save_file({**whole, key.replace("fc1", "fc9"): whole[key].clone()}, file)
    with pytest.raises(ValueError, match="for `fc9.weight` it has no place"):
        PeftModel.from_pretrained(case.model(), tmp_path)


def test_the_file_is_as_small_as_the_start_allows(tmp_path):
    sizes = {}
    for start in STARTS:
        model = replaced("llama", start=start)
        model.save_pretrained(tmp_path / start)
        sizes[start] = sum(t.numel() for t in load_file(tmp_path / start / "adapter_model.safetensors").values())
    count = len(unique_coordinates(replaced("llama"), "default"))
    assert sizes["orthogonal"] == sizes["random"] == 9 + 1 + count
    assert sizes["svd"] == 9 + 1 + replaced("llama").base_model.D


def test_factors_of_another_kind_are_not_loaded():
    saved = get_peft_model_state_dict(replaced("mlp", start="random"))
    with pytest.raises(ValueError, match="must belong to the adapter it is loaded into"):
        set_peft_model_state_dict(replaced("mlp", start="orthogonal"), saved)


def test_several_adapters():
    case = BY_NAME["mlp"]
    model = replaced("mlp")
    move(model, size=0.3)
    alone = outputs(model, case)
    model.add_adapter("added", SubspaceConfig(d=5, target_modules=["fc1", "fc2"]))
    model.add_adapter("other", SubspaceConfig(**{**REPLACED, "target_modules": ["fc1"], "start": "random"}))
    move(model, "added", size=0.3)
    assert torch.equal(outputs(model, case), alone)
    model.base_model.set_adapter(["default", "added"])
    both = outputs(model, case)
    plain = dense("mlp", model)
    with torch.no_grad():
        z = model.base_model.model.subspace_vectors.normalised("added")
        for path, coordinates in unique_coordinates(model, "added").items():
            plain.get_parameter(path).add_(coordinates.increment(z))
    torch.testing.assert_close(both, outputs(plain, case), **CLOSE)
    model.base_model.set_adapter(["added", "default"])
    torch.testing.assert_close(outputs(model, case), both, **CLOSE)
    before = tensors(model)
    model.merge_adapter(["added", "default"])
    torch.testing.assert_close(outputs(model, case), both, **CLOSE)
    model.unmerge_adapter()
    for name, tensor in model.state_dict().items():  # biases are given back by subtraction
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0 if name.endswith("weight") else 1e-6)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="At most one active adapter can replace a weight"):
        outputs(model, case)
    before = tensors(model)
    with pytest.raises(ValueError, match="At most one active adapter can replace a weight"):
        model.merge_adapter(["default", "other"])
    assert_same_state(model, before)
    model.set_adapter("default")
    assert torch.equal(outputs(model, case), alone)
    model.delete_adapter("other")
    assert torch.equal(outputs(model, case), alone)


def test_a_merge_that_is_refused_changes_nothing():
    model = replaced("mlp")
    with torch.no_grad():
        theta_d(model).fill_(torch.inf)
    before = tensors(model)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert_same_state(model, before)
    assert model.base_model.model.fc1._replaced == {}


@pytest.mark.parametrize("start", STARTS)
def test_a_weight_that_is_not_finite_changes_nothing(start):
    model = BY_NAME["mlp"].model()
    with torch.no_grad():
        model.fc2.weight[0, 0] = torch.nan
    config, names = (
        SubspaceConfig(**{**REPLACED, "target_modules": ["fc1", "fc2"], "start": start}),
        dict(model.named_modules()),
    )
    with pytest.raises(ValueError, match="`fc2.weight` is not"):
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


def test_a_config_that_was_used_is_not_of_a_new_adapter():
    used = SubspaceConfig(**{**REPLACED, "target_modules": ["fc1"]})
    get_peft_model(BY_NAME["mlp"].model(), used)
    again = get_peft_model(BY_NAME["mlp"].model(), dataclasses.replace(used, seed=3))
    for use in (lambda: outputs(again, BY_NAME["mlp"]), lambda: get_peft_model_state_dict(again)):
        with pytest.raises(ValueError, match="for a new one make a new SubspaceConfig"):
            use()


def test_in_double_precision_factors_are_too():
    model = replaced("mlp").double()
    move(model, size=0.3)
    x = BY_NAME["mlp"].batch().double()
    alone = run_model(model, x)
    model.merge_adapter()
    torch.testing.assert_close(run_model(model, x), alone, rtol=1e-12, atol=1e-12)


def test_mixed_batch():
    case = BY_NAME["mlp"]
    model = replaced("mlp")
    move(model, size=0.3)
    alone = outputs(model, case)
    mixed = outputs(model, case, adapter_names=["default", "__base__", "default"])
    torch.testing.assert_close(mixed, torch.stack([alone[0], base_outputs(case)[1], alone[2]]), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "convnet", "embeddings"])
def test_half_precision(name, dtype):
    case = BY_NAME[name]
    base = case.model().to(dtype)
    model = get_peft_model(base, SubspaceConfig(**{**REPLACED, "target_modules": TARGETS[name]})).eval()
    x = case.batch()
    found = run_model(model, x.to(dtype) if x.is_floating_point() else x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), outputs(replaced(name), case), rtol=0.1, atol=0.1)
    found.float().sum().backward()
    assert theta_d(model).grad.dtype == torch.float32
    assert theta_d(model).grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------- as LoRA


def lora(name, rank=2, alpha=3.0):
    """PEFT's LoRA, and ours with projection identity, from the same factors."""
    case, targets = BY_NAME[name], TARGETS[name]
    theirs = get_peft_model(case.model(), LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)).eval()
    ours = wrap(case, coordinates="low_rank", rank=rank, alpha=alpha, projection="identity", d=None,
                parameters=["weight"], target_modules=targets)  # fmt: skip
    with torch.no_grad():
        offset = 0
        for path, c in unique_coordinates(ours, "default").items():
            layer = theirs.base_model.model.get_submodule(path.removesuffix(".weight"))
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            B.copy_(0.1 * torch.randn(B.shape, generator=torch.Generator().manual_seed(offset)))
            left, right = (A.mT, B.mT) if type(layer.base_layer).__name__ == "Conv1D" else (B, A)
            parts = (left.flatten(1), right.flatten(1))
            for part, start in zip(parts, c.start(A.device), strict=True):
                part = part if start is None else part - start
                theta_d(ours)[offset : offset + part.numel()] = part.flatten()
                offset += part.numel()
    return ours, theirs


def lora_gradient(model, ours):
    """LoRA's gradient in the order of theta_d."""
    parts = []
    for path in unique_coordinates(ours, "default"):
        layer = model.base_model.model.get_submodule(path.removesuffix(".weight"))
        A, B = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
        left, right = (A.mT, B.mT) if type(layer.base_layer).__name__ == "Conv1D" else (B, A)
        parts += [left.flatten(), right.flatten()]
    return torch.cat(parts)


@pytest.mark.parametrize("name", ["mlp", "convnet", "llama"])
def test_identity_is_LoRA_from_the_same_factors(name):
    case = BY_NAME[name]
    ours, theirs = lora(name)
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) == theta_d(ours).numel()
    torch.testing.assert_close(outputs(ours, case), outputs(theirs, case), rtol=1e-5, atol=1e-5)
    for model in (ours, theirs):
        loss(model, case.batch()).backward()
    torch.testing.assert_close(theta_d(ours).grad, lora_gradient(theirs, ours), rtol=1e-4, atol=1e-5)
    for model in (ours, theirs):
        model.zero_grad()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            loss(model, case.batch()).backward()
            optimizer.step()
    torch.testing.assert_close(outputs(ours, case), outputs(theirs, case), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("factors", [2, 3])
@pytest.mark.parametrize("name", ["mlp", "llama"])
def test_an_increment_is_served_as_LoRA(name, factors):
    case = BY_NAME[name]
    model = replaced(name, replace_weight=False, factors=factors)
    move(model, size=0.3)
    config, state = convert_to_lora(model, rank=2)
    served = get_peft_model(case.model(), config).eval()
    set_peft_model_state_dict(served, state)
    torch.testing.assert_close(outputs(served, case), outputs(model, case), **CLOSE)
    assert (outputs(model, case) - base_outputs(case)).abs().max() > 1e-2


def test_a_replaced_weight_is_no_LoRA():
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(replaced("mlp"), rank=2)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "`rank` must be an integer of at least 1"),
        ({"rank": None}, "`rank` is needed"),
        ({"replace_weight": "svd"}, "`replace_weight` must be True or False"),
        ({"start": "zeros"}, "`start` must be one of svd, orthogonal, random"),
        ({"start": "svd", "replace_weight": False}, "`start` belongs to replace_weight=True"),
        ({"factors": 4}, "`factors` must be 2"),
        ({"gamma": 0.1}, "`gamma` belongs to factors=3"),
        ({"factors": 2.0}, "`factors` must be 2"),
        ({"gamma": -1.0, "factors": 3}, "`gamma` must be a finite number of at least 0"),
        ({"gamma": float("nan"), "factors": 3}, "`gamma` must be a finite number of at least 0"),
        ({"gamma": "x", "factors": 3}, "`gamma` must be a finite number of at least 0, got 'x'"),
        ({"gamma": True, "factors": 3}, "`gamma` must be a finite number of at least 0, got True"),
        ({"coordinates": "weight", "rank": None}, "belong to coordinates='low_rank'"),
    ],
)
def test_a_config_that_no_model_could_make_right(changes, message):
    with pytest.raises(ValueError, match=message):
        SubspaceConfig(**{**REPLACED, "target_modules": ["fc1"], **changes})


@pytest.mark.parametrize(
    ("name", "targets", "changes", "message"),
    [
        ("mlp", "all", {"rank": 5}, "`rank` must be at most the smaller dimension, 4 for `fc2.weight`"),
        ("convnet", ["conv2"], {}, "`conv2.weight` is of Conv2d of 2 groups"),
        ("recurrent", "all", {"parameters": None}, "must be given modules that run as two smaller ones"),
        ("attention", "all", {"parameters": None}, "must be given modules that run as two smaller ones"),
        ("norms", "all", {}, "need target tensors of two or more dimensions"),
    ],
)
def test_modules_that_do_not_fit(name, targets, changes, message):
    model = BY_NAME[name].model()
    before = tensors(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, SubspaceConfig(**{**REPLACED, "target_modules": targets, **changes}))
    assert_same_state(model, before)


@pytest.mark.parametrize(
    "other",
    [LoraConfig(r=2), AdaLoraConfig(init_r=2, target_r=1, total_step=9)],
)
@pytest.mark.filterwarnings("ignore:You are trying to modify", "ignore:Already found a .peft_config")
def test_a_module_holds_adapters_of_one_type(other):
    other.target_modules = {"fc1"}
    ours = SubspaceConfig(**{**REPLACED, "target_modules": ["fc1"]})
    theirs = get_peft_model(BY_NAME["mlp"].model(), other)
    with pytest.raises(ValueError, match="adapters of one PEFT type"):
        get_peft_model(theirs.base_model.model, ours)
    model = replaced("mlp")
    before = tensors(model)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("theirs", other)
    assert_same_state(model, before)
