"""Trajectories of known weights, and a count of allocated memory."""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subspace_peft import Trajectory
from tests.models import MLP


SHAPES = {name: tuple(p.shape) for name, p in MLP().named_parameters()}
D = 114  # entries of MLP


def walk(t=9, scale=0.1, dtype=torch.float32, seed=0):
    """t samples of MLP's weights, [D, t]: weights of size 1 that drift, with noise that shrinks."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(D, generator=generator, dtype=torch.float64)
    drift, samples = torch.randn(D, generator=generator, dtype=torch.float64), []
    for i in range(t):
        samples.append(w.to(dtype))
        w = w + scale * (drift + torch.randn(D, generator=generator, dtype=torch.float64)) / (i + 1)
    return torch.stack(samples, 1)


def write(folder, W):
    """Record the columns of W as samples, from a model with these weights."""
    trajectory = Trajectory(folder)
    model = MLP().to(W.dtype)
    for w in W.T:
        nn.utils.vector_to_parameters(w, model.parameters())
        trajectory.add(model)
    return trajectory


def flat(tensors):
    """One tensor of all these: [D], or [D, d] for a basis."""
    d = next(iter(tensors.values())).shape[len(SHAPES[next(iter(tensors))]) :]
    return torch.cat([tensor.reshape(-1, *d) for tensor in tensors.values()])


class Allocations(TorchDispatchMode):
    """The peak of the bytes that new tensors hold."""

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
