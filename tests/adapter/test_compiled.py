"""torch.compile and torch.export of adapted models: one graph, recorded once, whose outputs are those of the model."""

import contextlib
import copy
import functools
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2LayerNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from tests.cases import BY_NAME, close, loss, move, moved_base, outputs, run, settings, theta_d, wrap


SCRIPT = "ignore:.*torch.jit.script_method.*:DeprecationWarning"  # torch 2.13 itself uses it
MLP = BY_NAME["mlp"]
LOW_RANK = {"coordinates": "low_rank", "rank": 2, "target_modules": "all-linear"}
KINDS = [
    {"projection": "sparse"},
    {"projection": "fastfood", "cache_projection": False},
    {"projection": "dense", "cache_projection": False},
    LOW_RANK,
]


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch.compiler.reset()
    counters.clear()


class Wide(nn.Sequential):
    """Large enough for activations to run through the steps of `kronecker`."""

    def __init__(self):
        super().__init__(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


def steps(model: nn.Module, call: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> list[float]:
    """The losses of three steps, of which the first alone may record a graph."""
    losses = []
    for step in range(3):
        with dynamo.patch(error_on_recompile=True) if step else contextlib.nullcontext():
            optimizer.zero_grad()
            value = loss(call, x)
            value.backward()
            optimizer.step()
            losses.append(value.item())
    return losses


def check_training(make, x: torch.Tensor, backend: str = "aot_eager") -> tuple[PeftModel, nn.Module]:
    """Train a model that is compiled before its P is drawn, and one that is not."""
    model, plain = make().train(), make().train()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizers = [torch.optim.AdamW([theta_d(each)], lr=0.05) for each in (model, plain)]
    losses = steps(model, compiled, optimizers[0], x)
    close(losses, steps(plain, plain, optimizers[1], x), atol=1e-5, rtol=1e-5)
    assert len(set(losses)) == len(losses)
    close(theta_d(model), theta_d(plain), atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    return model, compiled


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_a_training_step_is_one_graph_and_recorded_once(changes):
    model, compiled = check_training(lambda: wrap(MLP, **changes), MLP.batch())
    run(model, MLP.batch())  # without a graph, which fills caches that no guard may depend on
    key = next(name for name in model.state_dict() if name.endswith("theta_d.default.vector"))
    generator = torch.Generator().manual_seed(5)
    swapped = {key: 0.1 * torch.randn(theta_d(model).shape, generator=generator)}
    with dynamo.patch(error_on_recompile=True):
        model.load_state_dict(swapped, strict=False)
        close(run(compiled, MLP.batch()), run(model, MLP.batch()), atol=1e-5)


class Blocks(nn.Module):
    """Many kinds of modules, in two blocks whose activations are made again for the backward pass."""

    def __init__(self, **kwargs):
        super().__init__()
        self.kwargs, self.tokens = kwargs, nn.Embedding(11, 8, padding_idx=2)
        kinds = lambda: [nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv1d(5, 5, 3, padding=1), nn.BatchNorm1d(5)]  # noqa: E731
        self.blocks = nn.ModuleList(nn.Sequential(*kinds(), Conv1D(8, 8), LlamaRMSNorm(8)) for _ in range(2))

    def forward(self, x):
        x = checkpoint(self.tokens, x, use_reentrant=False, **self.kwargs)
        for block in self.blocks:
            x = checkpoint(block, torch.tanh(x), use_reentrant=False, **self.kwargs)
        return x


SELECTIVE = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"context_fn": SELECTIVE}], ids=["plain", "selective"])
@pytest.mark.parametrize("changes", [{"projection": "kronecker"}, *KINDS[:2]], ids=str)
def test_checkpoints_are_in_the_graph(changes, kwargs, dtype):
    def gradient(compile_it):
        torch.manual_seed(0)
        model = get_peft_model(Blocks(**kwargs).to(dtype), settings(**changes)).train()
        move(model)
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compile_it else model
        call(torch.arange(10).view(2, 5)).float().square().sum().backward()
        return theta_d(model).grad

    found, expected = gradient(True), gradient(False)
    assert (found - expected).norm() < (1e-5 if dtype == torch.float32 else 0.05) * expected.norm()


class ReadsInAMethod(nn.Module):
    """As modules of transformers may."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def scaled(self, x):
        return self.weight * x

    def forward(self, x):
        return self.scaled(x)


class Remembers(ReadsInAMethod):
    """As recurrent blocks of transformers do."""

    state = None

    def remember(self, x):
        self.state = x if self.state is None else self.state + x

    def forward(self, x):
        self.remember(x)
        self.state = 2 * self.state
        return self.scaled(self.state)


class Image(nn.Module):
    """As ConvNextV2 has them: norms whose forward calls that of torch."""

    def __init__(self):
        super().__init__()
        self.norm = ConvNextV2LayerNorm(4, data_format="channels_first")

    def forward(self, x):
        return self.norm(x.view(2, 4, 2, 1)).flatten(1)


@pytest.mark.filterwarnings("ignore:.*side effects.*:UserWarning")
@pytest.mark.parametrize("make", [Image, ReadsInAMethod, Remembers], ids=lambda make: make.__name__)
def test_a_forward_that_calls_that_of_its_parent_or_another_method(make, monkeypatch):
    for each in (ReadsInAMethod, Remembers):
        monkeypatch.setattr(each, "__module__", "transformers.models")
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(make()), settings(parameters="vectors", d=2))
    move(model)
    plain, x = copy.deepcopy(model), torch.randn(2, 8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    moved = compiled(x)
    close(moved, plain(x), atol=1e-6)
    gradients = [
        torch.autograd.grad(call(x).sum() ** 2, theta_d(m))[0] for call, m in ((compiled, model), (plain, plain))
    ]
    close(*gradients, atol=1e-5)
    with plain.disable_adapter():
        assert not torch.allclose(plain(x), moved)


def test_activations_that_run_through_p_are_in_the_graph():
    def make():
        torch.manual_seed(0)
        return get_peft_model(Wide(), settings(projection="kronecker", parameters=["weight"]))

    check_training(make, torch.randn(3, 16))


@pytest.mark.filterwarnings(SCRIPT)
def test_the_default_backend_compiles():
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    check_training(lambda: wrap(MLP, projection="fastjl"), MLP.batch(), "inductor")


def test_a_file_with_another_start_is_not_the_one_that_was_recorded(tmp_path):
    """The factors at theta_d = 0 are constants of a graph, and loading a file changes them."""
    replaced = {**LOW_RANK, "replace_weight": True, "start": "svd", "d": 9, "parameters": ["weight"]}
    model = wrap(MLP, **replaced)
    other = MLP.model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    other = get_peft_model(other, settings(**replaced)).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = outputs(compiled, MLP)
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert not torch.allclose(outputs(model, MLP), before)
    close(outputs(compiled, MLP), outputs(model, MLP), atol=1e-5)


# a module's tensors are replaced while it runs, and put back
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize(("changes", "strict"), [({"projection": "sparse"}, False), (LOW_RANK, True)], ids=str)
def test_an_exported_model_is_the_model_and_so_is_an_exported_merged_one(changes, strict):
    model, x = wrap(MLP, **changes), MLP.batch()
    move(model)
    exported = torch.export.export(model, (x,), strict=strict)
    expected = outputs(model, MLP)  # after the export, which must leave no tensor of its own in a cache
    close(exported.module()(x), expected, atol=1e-6)
    vector = next(name for name in exported.state_dict if "theta_d" in name)
    follows = exported.module()
    follows.load_state_dict({vector: 2 * theta_d(model)}, strict=False)
    with torch.no_grad():
        theta_d(model).mul_(2)
    close(follows(x), outputs(model, MLP), atol=1e-6)
    if "coordinates" not in changes:
        close(follows(x), run(moved_base(MLP, model), x), atol=1e-5)
    expected = outputs(model, MLP)
    merged = model.merge_and_unload()  # into tensors that the exported model shares
    close(torch.export.export(merged, (x,), strict=strict).module()(x), expected, atol=1e-5)
