"""Forming: no moved tensor is held for the backward pass, and gradients are those of a plain model that holds them."""

import copy
import gc
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from subspace_peft import SubspaceConfig
from subspace_peft.adapter import forming
from tests.cases import move, theta_d


SIDE = 160  # a weight then has 25 600 entries, more than are held
PROJECTIONS = ("fastfood", "fastjl", "sparse", "dense", "kronecker", "basis", "coordinate", "identity")

pytestmark = pytest.mark.skipif(forming.OUTER_HOOKS is None, reason="torch before 2.8 does not name the hooks")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(SIDE, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, SIDE, SIDE) / SIDE**0.5)

    def forward(self, x):
        return sum(F.linear(x, expert) for expert in self.stack)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(SIDE, SIDE // 4, batch_first=True)

    def forward(self, x):
        return self.inner(x)[0]


class Images(nn.Module):
    def __init__(self, convolution):
        super().__init__()
        self.inner = convolution

    def forward(self, x):
        return self.inner(x.view(len(x), 64, 10, 10))


KINDS = {
    "linear": lambda: nn.Linear(SIDE, SIDE),
    "conv1d of transformers": lambda: Conv1D(SIDE, SIDE),
    "convolution": lambda: Images(nn.Conv2d(64, 48, 3)),
    "transposed convolution": lambda: Images(nn.ConvTranspose2d(64, 48, 3)),
    "normalisation": lambda: nn.LayerNorm([40, SIDE]),
    "attention": Attention,
    "experts": Experts,
    "recurrent": Recurrent,
}


def base_of(kind):
    """A module between two that train, so that its input needs a gradient."""
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(SIDE), KINDS[kind]())


def inputs():
    return torch.randn(2, 40, SIDE, generator=torch.Generator().manual_seed(1), requires_grad=True)


def wrapped(base, projection="fastjl", **settings):
    targets = [name for name, module in base.named_modules() if name and list(module.parameters(recurse=False))]
    settings = {"d": 20, "projection": projection, "target_modules": [t for t in targets if t != "0"], **settings}
    D = sum(p.numel() for name, p in base.named_parameters() if not name.startswith("0."))
    if projection == "basis":
        settings["basis"] = torch.randn(D, 20, generator=torch.Generator().manual_seed(2)) / D**0.5
    elif projection in ("coordinate", "identity"):
        settings["d"] = None
        if projection == "coordinate":
            settings["mask"] = torch.rand(D, generator=torch.Generator().manual_seed(2)) < 0.3
    model = get_peft_model(base, SubspaceConfig(**settings))
    move(model, size=0.01)
    return model


def plain_copy(model, base):
    """The base with moved tensors of its own, which know nothing of an adapter."""
    twin = copy.deepcopy(base).requires_grad_(False)
    for name, module in model.base_model.model.named_modules():
        for path, moved in (module.moved(["default"]) if hasattr(module, "coordinates") else {}).items():
            twin.get_submodule(name.replace(".base_layer", ""))._parameters[path] = nn.Parameter(moved.detach().clone())
    return twin


def held(run, known):
    """Bytes that autograd holds after `run`, in storages that none of the known tensors has, and its output."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage()._cdata] = weakref.ref(tensor.untyped_storage()), tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    for tensor in known:
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(size for _, size in storages.values()), output


def live_bytes():
    """Bytes of all tensors that Python or autograd's graphs hold; each is weighed once."""
    gc.collect()
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor}
