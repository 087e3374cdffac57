"""LoRA: projection identity is LoRA from the same factors, and PEFT's LoRA can hold an increment."""

import pytest
import torch
from peft import LoraConfig, convert_to_lora, get_peft_model, set_peft_model_state_dict

from subspace_peft.adapter.walk import unique_coordinates
from tests.cases import BY_NAME, REPLACED_TARGETS, base_outputs, loss, move, outputs, replaced, theta_d, wrap


CLOSE = {"rtol": 1e-4, "atol": 1e-4}
pytestmark = pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning")


def lora(name, rank=2, alpha=3.0):
    """Our adapter with projection identity, and PEFT's LoRA, with the same factors."""
    case, targets = BY_NAME[name], REPLACED_TARGETS[name]
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
