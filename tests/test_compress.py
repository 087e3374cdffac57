"""compress: a plain model of smaller modules."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from subspace_peft import SubspaceConfig, compress
from subspace_peft.adapter_file import unique_coordinates
from tests.cases import BY_NAME, move, outputs, tensors, train, wrap


REPLACED = {"coordinates": "low_rank", "rank": 2, "replace_weight": True, "parameters": ["weight"], "d": 9}
TARGETS = {
    "mlp": ["fc1", "fc2"],
    "convnet": ["conv1", "head"],
    "embeddings": ["tokens", "mix"],
    "gpt2": ["c_attn", "c_fc"],
    "llama": "all-linear",
}


@pytest.mark.parametrize("factors", [2, 3])
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning")
def test_the_outputs_are_the_adapters(name, factors):
    case = BY_NAME[name]
    model = wrap(case, **REPLACED, target_modules=TARGETS[name], factors=factors)
    train(model, case)
    expected, whole = outputs(model, case), sum(p.numel() for p in case.model().parameters())
    replaced = unique_coordinates(model, "default").values()
    saved = sum(torch.Size(c.shape).numel() - sum(c.shape[:1]) * 2 - 2 * c.start.shape.columns for c in replaced)
    plain = compress(model)
    torch.testing.assert_close(outputs(plain, case), expected, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in plain.parameters()) == whole - saved
    assert not any("subspace" in name for name, _ in plain.named_modules())


def test_what_was_trained_beside_it_is_kept():
    case = BY_NAME["mlp"]
    model = wrap(case, **REPLACED, target_modules=["fc1"], modules_to_save=["fc2"])
    train(model, case)
    expected = outputs(model, case)
    plain = compress(model)
    torch.testing.assert_close(outputs(plain, case), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(plain.fc1, nn.Sequential)
    assert not torch.equal(plain.fc2.weight, case.model().fc2.weight)


def test_conv_options_are_kept():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=2, dilation=2, padding_mode="circular", bias=False))
    model = get_peft_model(base, SubspaceConfig(**{**REPLACED, "target_modules": ["0"]}))
    move(model)
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    torch.testing.assert_close(compress(model)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning")
def test_what_cannot_be_compressed():
    added = wrap(BY_NAME["mlp"])
    with pytest.raises(ValueError, match="must be that of an adapter with replace_weight=True, got 'default'"):
        compress(added)
    with pytest.raises(ValueError, match="got 'nobody'; the model has default"):
        compress(wrap(BY_NAME["mlp"], **REPLACED), "nobody")
    tied = wrap(BY_NAME["tied"], **REPLACED)
    before = tensors(tied)
    with pytest.raises(ValueError, match="A tied weight cannot become two modules"):
        compress(tied)
    assert tensors(tied).keys() == before.keys()
    merged = wrap(BY_NAME["mlp"], **REPLACED)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="No adapter must be merged"):
        compress(merged)
