"""Small models that every behaviour is tested on. A new case joins CASES and is tested by that."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from subspace_peft import SubspaceConfig, Trajectory
from subspace_peft.adapter_file import find_vectors, unique_coordinates


class MLP(nn.Module):
    """Two linears."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


class ConvNet(nn.Module):
    """Two convolutions with batch norm, and a linear."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Norms(nn.Module):
    """Layer, RMS, group and instance norm."""

    def __init__(self):
        super().__init__()
        self.layer, self.rms = nn.LayerNorm(6), nn.RMSNorm(6)
        self.group, self.instance = nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True)

    def forward(self, x):
        return self.instance(self.group(self.rms(torch.tanh(self.layer(x)))).tanh())


class Convs(nn.Module):
    """Convolutions of one to three dimensions, plain, grouped, dilated and transposed."""

    def __init__(self):
        super().__init__()
        self.one, self.one_up = nn.Conv1d(2, 4, 3, padding="same"), nn.ConvTranspose1d(4, 2, 2)
        self.two, self.two_up = nn.Conv2d(2, 4, 3, dilation=2, groups=2), nn.ConvTranspose2d(4, 2, 3, stride=2)
        self.three, self.three_up = nn.Conv3d(2, 2, 2, bias=False), nn.ConvTranspose3d(2, 1, 2)

    def forward(self, x):  # [batch, 2, 512]
        one = self.one_up(torch.tanh(self.one(x)))
        two = self.two_up(torch.tanh(self.two(one[..., :64].unflatten(2, (8, 8)))))
        three = self.three_up(torch.tanh(self.three(one[..., :64].unflatten(2, (4, 4, 4)))))
        return torch.cat([t.flatten(1) for t in (one, two, three)], 1)


class Embeddings(nn.Module):
    """Embedding with padding, bag of embeddings, transformers' Conv1D."""

    def __init__(self):
        super().__init__()
        self.tokens, self.bag = nn.Embedding(11, 4, padding_idx=0), nn.EmbeddingBag(11, 4)
        self.mix = Conv1D(5, 4)

    def forward(self, ids):
        return self.mix(self.tokens(ids) + self.bag(ids).unsqueeze(1))


class Attention(nn.Module):
    """Multi-head attention with one projection matrix, and with three."""

    def __init__(self):
        super().__init__()
        self.packed = nn.MultiheadAttention(8, 2, batch_first=True)
        self.split = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)

    def forward(self, x):
        x = self.packed(x, x, x)[0]
        return self.split(x, x[..., :6], x[..., :6], need_weights=False)[0]


class Recurrent(nn.Module):
    """LSTM of two layers and bidirectional GRU."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru = nn.LSTM(4, 5, 2, batch_first=True), nn.GRU(5, 3, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.gru(self.lstm(x)[0])[0]


class Scale(nn.Module):
    """A module of no known kind, which owns bare parameters and has a child with more."""

    def __init__(self):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.zeros(()))
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) * self.gain + self.shift


class Bare(nn.Module):
    """A custom module inside another."""

    def __init__(self):
        super().__init__()
        self.scale, self.out = Scale(), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.scale(x).tanh())


class Tied(nn.Module):
    """An embedding whose weight is the output layer's."""

    def __init__(self):
        super().__init__()
        self.tokens, self.middle = nn.Embedding(11, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 11, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, ids):
        return self.out(torch.tanh(self.middle(self.tokens(ids))))


class SharedModules(nn.Module):
    """One module under two names, run twice; and one with a child."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.blocks = nn.ModuleList([block, block])

    def forward(self, x):
        for layer in (self.first, self.second, *self.blocks):
            x = layer(torch.tanh(x))
        return x


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


TEXT = {"vocab_size": 23, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**TEXT, **SMALL, num_key_value_heads=1, max_position_embeddings=32)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**TEXT, n_embd=8, n_layer=2, n_head=2, n_positions=32, **off)
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**TEXT, **SMALL, max_position_embeddings=32, num_labels=3, **off)
    return transformers.BertForSequenceClassification(config)


def vit() -> nn.Module:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3, **off)
    return transformers.ViTForImageClassification(config)


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def tokens(*shape: int, below: int = 11) -> Callable[[], Tensor]:
    return lambda: torch.randint(3, below, shape)


@dataclass(frozen=True)
class Case:
    """A model, and what it is run on."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    tied: bool = False
    mixed: bool = True  # whether every target takes one sample a row of its first argument, and none lies in another

    def model(self) -> nn.Module:
        """The same model at each call, in eval mode."""
        torch.manual_seed(0)
        model = self.build().eval()
        with torch.no_grad():  # biases and norms that are zero or one would hide mistakes
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model

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
    """The case's model with an adapter, in eval mode."""
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
    """The model of that case with weights replaced by factors."""
    return wrap(BY_NAME[name], **{**REPLACED, "target_modules": REPLACED_TARGETS[name], **changes})


def run(model: nn.Module, x: Tensor, **kwargs) -> Tensor:
    """The model's output as one tensor."""
    out = model(x, **kwargs)
    return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def outputs(model: nn.Module, case: Case, **kwargs) -> Tensor:
    return run(model, case.batch(), **kwargs)


def base_outputs(case: Case) -> Tensor:
    """Those of the case's model by the operations that the wrapped model runs too.

    Whether weights are frozen, and whether nn.TransformerEncoderLayer takes its fast path, changes the rounding.
    """
    model = case.model().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_hook(lambda *args: None)
    return outputs(model, case)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    """A loss in which every output counts, each differently."""
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
    """P of weight coordinates by the tensors it moves, from unit vectors: [n, d] each."""
    factor = find_vectors(model).factors[adapter]
    units = torch.eye(theta_d(model, adapter).numel()) * factor
    return {
        name: c.increment(units).reshape(len(units), -1).T for name, c in unique_coordinates(model, adapter).items()
    }


@torch.no_grad()
def moved_base(case: Case, model: nn.Module, adapter: str = "default") -> nn.Module:
    """The oracle: a plain model of the case whose weights are origin + P theta_d."""
    plain = case.model()
    for name, P in dense_P(model, adapter).items():
        parameter = plain.get_parameter(name)
        parameter.add_((P @ theta_d(model, adapter)).view(parameter.shape))
    return plain


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole state."""
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
    """What is done inside is a ValueError, and the model stays as it was."""
    before, shape = tensors(model), tree(model)
    with pytest.raises(ValueError, match=message):
        yield
    assert tree(model) == shape
    assert_same_state(model, before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, atol=1e-12, rtol=1e-9):
    """Numbers or tensors, in double precision."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


SHAPES = {name: tuple(p.shape) for name, p in MLP().named_parameters()}
D = 114  # entries of MLP


def walk(t=9, scale=0.1, dtype=torch.float32, seed=0):
    """t samples of MLP's weights, [D, t]: a drift and noise of falling size, around weights of size 1."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(D, generator=generator, dtype=torch.float64)
    drift, samples = torch.randn(D, generator=generator, dtype=torch.float64), []
    for i in range(t):
        samples.append(w.to(dtype))
        w = w + scale * (drift + torch.randn(D, generator=generator, dtype=torch.float64)) / (i + 1)
    return torch.stack(samples, 1)


def write(folder, W):
    """The columns of W as samples, from a model that has them as weights."""
    trajectory = Trajectory(folder)
    model = MLP().to(W.dtype)
    for w in W.T:
        nn.utils.vector_to_parameters(w, model.parameters())
        trajectory.add(model)
    return trajectory


def flat(tensors):
    """[D], or [D, d] of a basis."""
    d = next(iter(tensors.values())).shape[len(SHAPES[next(iter(tensors))]) :]
    return torch.cat([tensor.reshape(-1, *d) for tensor in tensors.values()])


class Allocations(TorchDispatchMode):
    """The most bytes that new tensors hold at a time."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out
