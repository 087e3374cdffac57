"""Graphs: models that were compiled before they are wrapped, and torch.jit.trace; selective checkpoints."""

from functools import partial

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from subspace_peft.adapter.walk import unique_coordinates
from tests.cases import BY_NAME, base_outputs, close, loss, move, outputs, refused, run, settings, theta_d, wrap
from tests.models import MLP, TEXT


MLP_CASE = BY_NAME["mlp"]


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch.compiler.reset()


def test_a_compiled_model_is_wrapped_as_the_one_inside(tmp_path):
    plain = wrap(MLP_CASE)
    model = get_peft_model(compiled(MLP_CASE.model()), settings()).eval()
    assert torch.equal(outputs(model, MLP_CASE), base_outputs(MLP_CASE))
    assert list(unique_coordinates(model, "default")) == list(unique_coordinates(plain, "default"))
    for each in (plain, model):
        move(each)
        loss(each, MLP_CASE.batch()).backward()
    close(outputs(model, MLP_CASE), outputs(plain, MLP_CASE), atol=1e-6)
    close(theta_d(model).grad, theta_d(plain).grad, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(outputs(model, MLP_CASE), base_outputs(MLP_CASE))
    model.save_pretrained(tmp_path / "compiled")
    plain.save_pretrained(tmp_path / "plain")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("compiled", "plain")]
    assert files[0].keys() == files[1].keys()
    for name, base in (("compiled", MLP_CASE.model()), ("plain", compiled(MLP_CASE.model()))):
        again = PeftModel.from_pretrained(base, tmp_path / name).eval()
        close(outputs(again, MLP_CASE), outputs(plain, MLP_CASE), atol=1e-6)
    merged = model.merge_and_unload()
    close(outputs(merged, MLP_CASE), outputs(plain, MLP_CASE), atol=1e-6)
    assert list(merged._orig_mod.state_dict()) == list(MLP_CASE.model().state_dict())


def test_a_compiled_module_leaves_the_names_of_tensors_as_they_are():
    model = nn.Sequential(compiled(MLP()), nn.Linear(4, 2))
    adapted = get_peft_model(model, settings())
    assert "0.fc1.weight" in unique_coordinates(adapted, "default")
    x, before = torch.randn(3, 6), adapted(torch.ones(3, 6))
    move(adapted)
    assert not torch.allclose(adapted(torch.ones(3, 6)), before)
    expected = adapted(x)
    close(adapted.merge_and_unload()(x), expected, atol=1e-6)


def test_a_target_that_is_compiled_alone_is_refused():
    model = MLP()
    model.fc1 = compiled(model.fc1)
    with refused(model, "must not be compiled by itself, `fc1` is"):
        get_peft_model(model, settings())


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "changes",
    [
        {"projection": "fastfood"},
        {"projection": "fastfood", "cache_projection": False},
        {"projection": "identity", "d": None},
        {"coordinates": "low_rank", "rank": 8},
    ],
    ids=str,
)
def test_jit_trace_records_a_model_that_follows_theta_d(changes):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **sizes))
    model = Logits(get_peft_model(base, settings(**{"d": 300, "target_modules": "all-linear", **changes})).eval())
    move(model)
    ids, others = torch.randint(3, 23, (2, 2, 5))
    traced = torch.jit.trace(model, (ids,))
    close(traced(ids), model(ids), atol=1e-6)
    move(model, seed=4)
    close(traced(others), model(others), atol=1e-6)


PRODUCTS = [getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "convolution")]
POLICIES = {"products": PRODUCTS, "all": lambda *args, **kwargs: CheckpointPolicy.MUST_SAVE}
CHANGES = [{"projection": name} for name in ("kronecker", "fastjl", "fastfood", "sparse", "dense")]
CHANGES += [{"projection": "identity", "d": None}, {"projection": "kronecker", "cache_projection": False}]
CHANGES += [{"projection": "fastfood", "coordinates": "low_rank", "rank": 2, "d": 5}]
CHANGES += [CHANGES[-1] | {"replace_weight": True, "start": "orthogonal", "parameters": ["weight"]}]
CHECKPOINTED = {"convnet": ["conv1", "head"], "embeddings": ["tokens", "mix"], "tied": "all", "llama": "all-linear"}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: "-".join(map(str, changes.values())))
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_selective_checkpoints(name, changes, policy):
    """They count all operations, but P has fewer of them where a cache holds P z by then."""
    case, context = BY_NAME[name], partial(create_selective_checkpoint_contexts, POLICIES[policy])
    model = wrap(case, **changes, target_modules=CHECKPOINTED[name])
    move(model)
    checkpoint(partial(run, model), case.batch(), use_reentrant=False, context_fn=context).square().sum().backward()
    found, theta_d(model).grad = theta_d(model).grad, None
    run(model, case.batch()).square().sum().backward()
    close(found, theta_d(model).grad, atol=1e-6, rtol=1e-6)


class Reader(nn.Module):
    """Reads the weight of a child, in a block that is checkpointed."""

    def __init__(self, context):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        through = partial(checkpoint, use_reentrant=False, context_fn=context)
        self.run = through if context else lambda block, x: block(x)

    def block(self, x):
        return torch.tanh(self.first(x)) @ self.second.weight.mT

    def forward(self, x):
        for _ in range(2):
            x = self.run(self.block, x)
        return x


@pytest.mark.parametrize("changes", [{}, {"projection": "dense"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_selective_checkpoints_of_blocks_that_read_a_weight(dtype, changes):
    gradients = []
    for context in (None, partial(create_selective_checkpoint_contexts, PRODUCTS)):
        torch.manual_seed(0)
        model = get_peft_model(Reader(context).to(dtype), settings(**changes))
        move(model)
        model(torch.ones(3, 6, dtype=dtype, requires_grad=True)).sum().backward()
        gradients.append(theta_d(model).grad)
    close(*gradients, atol=1e-6, rtol=1e-6)


def test_other_modes_see_what_selective_checkpoints_do_not():
    counts = []
    for kwargs in ({}, {"context_fn": partial(create_selective_checkpoint_contexts, PRODUCTS)}):
        model = wrap(MLP_CASE, projection="dense", target_modules=["fc1", "fc2"])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            checkpoint(model, MLP_CASE.batch(), use_reentrant=False, **kwargs)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
