"""compress: a plain model with two smaller modules in the place of each replaced weight."""

import pytest
import torch
from accelerate import cpu_offload
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from subspace_peft import SubspaceConfig, compress
from subspace_peft.adapter.walk import unique_coordinates
from subspace_peft.coordinates.factored import smaller
from tests.cases import BY_NAME, assert_same_state, move, outputs, tensors, train, wrap


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
    expected, total = outputs(model, case), sum(p.numel() for p in case.model().parameters())
    replaced = unique_coordinates(model, "default").values()
    saved = sum(torch.Size(c.shape).numel() - sum(c.shape[:1]) * 2 - 2 * c.start.shapes.columns for c in replaced)
    plain = compress(model)
    torch.testing.assert_close(outputs(plain, case), expected, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in plain.parameters()) == total - saved
    assert not any("subspace" in name for name, _ in plain.named_modules())


def test_modules_to_save_are_kept():
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


def test_modules_whose_parent_reads_their_weight():
    torch.manual_seed(0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    model = get_peft_model(base, SubspaceConfig(**{**REPLACED, "target_modules": ["q", "wo", "wi"]}))
    ids = torch.randint(20, (2, 5))
    expected = model(input_ids=ids, labels=ids).logits
    plain = compress(model)
    torch.testing.assert_close(plain(input_ids=ids, labels=ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(6, 4), torch.randn(2, 6)),
        (Conv1D(4, 6), torch.randn(2, 6)),
        (nn.Conv2d(3, 4, (3, 2)), torch.randn(2, 3, 5, 5)),
        (nn.Embedding(7, 4), torch.tensor([1, 6])),
    ],
)
def test_the_weight_of_two_modules_is_the_product(module, x):
    rows, columns = module.weight.flatten(1).shape
    small = smaller(module, torch.randn(rows, 2), torch.randn(2, columns))
    assert small.weight.shape == module.weight.shape
    dense = torch.func.functional_call(module, {"weight": small.weight}, x)
    torch.testing.assert_close(small(x), dense, rtol=1e-4, atol=1e-5)
    assert small.bias is None or torch.equal(small.bias, module.bias)


def test_names_inside_another_adapters_module():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.lin = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

        def forward(self, x):
            return self.lin(x) * self.gain

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(Outer()), SubspaceConfig(**{**REPLACED, "target_modules": ["0.lin"]}))
    model.add_adapter("outer", SubspaceConfig(d=2, target_modules=["0"]))
    x = torch.randn(3, 4)
    expected = model(x)
    torch.testing.assert_close(compress(model)(x), expected, rtol=1e-4, atol=1e-5)


def test_a_convolution_with_other_constructor_arguments():
    class Patch(nn.Conv2d):
        def __init__(self, width):
            super().__init__(3, width, 2)

    model = get_peft_model(nn.Sequential(Patch(5)), SubspaceConfig(**{**REPLACED, "target_modules": ["0"]}))
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    torch.testing.assert_close(compress(model)(x), expected, rtol=1e-4, atol=1e-5)


def test_offloaded_weights_and_what_trains_then():
    model = wrap(BY_NAME["mlp"], **REPLACED, target_modules=["fc1"])
    expected = outputs(model, BY_NAME["mlp"])
    cpu_offload(model, execution_device=torch.device("cpu"))
    plain = compress(model)
    torch.testing.assert_close(outputs(plain, BY_NAME["mlp"]), expected, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad and p.device.type == "cpu" for p in plain.fc1.parameters())


@pytest.mark.filterwarnings("ignore:Model .*tie:UserWarning")
def test_what_cannot_be_compressed():
    with pytest.raises(ValueError, match="`model` must be a PeftModel, got MLP"):
        compress(
            inject_adapter_in_model(SubspaceConfig(**{**REPLACED, "target_modules": ["fc1"]}), BY_NAME["mlp"].model())
        )
    two = wrap(BY_NAME["mlp"], **REPLACED)
    two.add_adapter("other", SubspaceConfig(**{**REPLACED, "target_modules": ["fc1"]}))
    with pytest.raises(
        ValueError, match="must be the only active one, got \\['default'\\]; call set_adapter\\('other'\\)"
    ):
        compress(two, "other")
    added = wrap(BY_NAME["mlp"])
    with pytest.raises(ValueError, match="must be that of an adapter with replace_weight=True, got 'default'"):
        compress(added)
    with pytest.raises(ValueError, match="got 'nobody'; the model has default"):
        compress(wrap(BY_NAME["mlp"], **REPLACED), "nobody")
    tied = wrap(BY_NAME["tied"], **REPLACED)
    before = tensors(tied)
    with pytest.raises(ValueError, match="must be in one module alone to become two modules, that of `.*` is tied"):
        compress(tied)
    assert_same_state(tied, before)
    merged = wrap(BY_NAME["mlp"], **REPLACED)
    merged.merge_adapter()
    with pytest.raises(
        ValueError, match="must have no merged adapter to be compressed, `.*fc1` has one; call unmerge_adapter"
    ):
        compress(merged)
