"""Cases: the models that every behaviour is tested on, and helpers for tests. A new case is one line in CASES."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from subspace_peft import SubspaceConfig
from subspace_peft.adapter.walk import find_vectors, unique_coordinates
from tests.models import (
    MLP,
    Attention,
    Bare,
    ConvNet,
    Convs,
    Embeddings,
    Norms,
    Padded,
    Recurrent,
    SharedModules,
    Tied,
    bert,
    encoder,
    gpt2,
    llama,
    vit,
)


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def tokens(*shape: int, below: int = 11) -> Callable[[], Tensor]:
    return lambda: torch.randint(3, below, shape)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The same model at each call, in evaluation mode."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():  # biases and norms that are zero or one would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@dataclass(frozen=True)
class Case:
    """A model, and the inputs it runs on."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    tied: bool = False
    mixed: bool = True  # whether every target takes samples along dimension 0, and no target contains another

    def model(self) -> nn.Module:
        """The same model at each call, in evaluation mode."""
        return seeded(self.build)

    def batch(self) -> Tensor:
        torch.manual_seed(1)
        return self.inputs()

    def __repr__(self) -> str:
        return self.name


CASES = [
    Case("mlp", MLP, floats(3, 6)),
    Case("sequential", lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), floats(3, 6)),
    Case("convnet", ConvNet, floats(3, 3, 8, 8)),
    Case("norms", Norms, floats(3, 4, 6)),
    Case("convs", Convs, floats(3, 2, 512)),
    Case("embeddings", Embeddings, tokens(3, 5)),
    Case("padded", Padded, lambda: torch.randint(11, (3, 9)), tied=True),
    Case("attention", Attention, floats(3, 5, 8), mixed=False),
    Case("recurrent", Recurrent, floats(3, 5, 4), mixed=False),
    Case("bare", Bare, floats(3, 4), mixed=False),
    Case("tied", Tied, tokens(3, 5), tied=True),
    Case("shared_modules", SharedModules, floats(3, 4)),
    Case("encoder", encoder, floats(3, 5, 8), mixed=False),
    Case("llama", llama, tokens(3, 5, below=23)),
    Case("gpt2", gpt2, tokens(3, 5, below=23), tied=True, mixed=False),
    Case("bert", bert, tokens(3, 5, below=23), mixed=False),
    Case("vit", vit, floats(3, 3, 8, 8), mixed=False),
]


BY_NAME = {case.name: case for case in CASES}


def settings(**changes) -> SubspaceConfig:
    return SubspaceConfig(**{"d": 7, "projection": "fastfood", "target_modules": "all", **changes})


def wrap(case: Case, adapter_name: str = "default", **changes) -> PeftModel:
    """The case's model with an adapter, in evaluation mode."""
    return get_peft_model(case.model(), settings(**changes), adapter_name=adapter_name).eval()


REPLACED = {"coordinates": "low_rank", "rank": 2, "replace_weight": True, "parameters": ["weight"], "d": 9}
REPLACED_TARGETS = {
    "mlp": ["fc1", "fc2"],
    "convnet": ["conv1", "head"],
    "embeddings": ["tokens", "mix"],
    "tied": "all",
    "gpt2": ["c_attn", "c_fc", "wte"],
    "llama": "all-linear",
}


def replaced(name: str, **changes) -> PeftModel:
    """The case's model with weights replaced by factors."""
    return wrap(BY_NAME[name], **{**REPLACED, "target_modules": REPLACED_TARGETS[name], **changes})


@torch.no_grad()
def product_base(name: str, model: nn.Module) -> nn.Module:
    """The oracle of `replaced`: a plain model of that case that holds the products of the factors."""
    plain = BY_NAME[name].model()
    z = find_vectors(model).normalised("default")
    for path, coordinates in unique_coordinates(model, "default").items():
        left, right = coordinates.factors(z)
        parameter = plain.get_parameter(path)
        parameter.copy_((left @ right).view(parameter.shape))
    return plain


def run(model: nn.Module, x: Tensor, **kwargs) -> Tensor:
    """The model's output as one tensor."""
    out = model(x, **kwargs)
    return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def outputs(model: nn.Module, case: Case, **kwargs) -> Tensor:
    return run(model, case.batch(), **kwargs)


def base_outputs(case: Case) -> Tensor:
    """The outputs of the case's model, by the operations that the wrapped model runs.

    The rounding depends on whether weights are frozen, and whether nn.TransformerEncoderLayer takes its fast path.
    """
    model = case.model().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_hook(lambda *args: None)
    return outputs(model, case)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """A loss to which every output contributes with another weight."""
    out = run(model, x).double()
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return (out * probe).sum() / out.numel() ** 0.5


def train(model: nn.Module, case: Case, steps: int = 2, lr: float = 0.02) -> None:
    """Some steps of Adam in training mode."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, case.batch()).backward()
        optimizer.step()
    model.eval()


def theta_d(model: nn.Module, adapter: str = "default") -> nn.Parameter:
    return find_vectors(model).subspace_peft_theta_d[adapter]


@torch.no_grad()
def move(model: nn.Module, adapter: str = "default", size: float = 0.05, seed: int = 3) -> None:
    """Give theta_d a value without training."""
    vector = theta_d(model, adapter)
    vector.copy_(size * torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed)))


@torch.no_grad()
def dense_P(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """The rows of P of each target tensor, read off from unit vectors, for weight coordinates: [n, d]."""
    scale = find_vectors(model).scales[adapter]
    units = torch.eye(theta_d(model, adapter).numel()) * scale
    return {
        name: c.increment(units).reshape(len(units), -1).T for name, c in unique_coordinates(model, adapter).items()
    }


@torch.no_grad()
def moved_base(case: Case, model: nn.Module, adapter: str = "default") -> nn.Module:
    """The oracle: a plain model of the case with weights origin + P theta_d."""
    plain = case.model()
    for name, P in dense_P(model, adapter).items():
        parameter = plain.get_parameter(name)
        parameter.add_((P @ theta_d(model, adapter)).view(parameter.shape))
    return plain


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return copy.deepcopy(dict(model.state_dict()))


def tree(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules(remove_duplicate=False)]


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name


@contextmanager
def refused(model: nn.Module, message: str) -> Iterator[None]:
    """Assert that the block raises this ValueError and leaves the model as it was."""
    before, shape = tensors(model), tree(model)
    with pytest.raises(ValueError, match=message):
        yield
    assert tree(model) == shape
    assert_same_state(model, before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, atol=1e-12, rtol=1e-9):
    """Assert that numbers or tensors are close in double precision."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)
