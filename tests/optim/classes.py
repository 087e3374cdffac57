"""A small classifier, a batch for it, and its class gradients, example by example."""

import torch
from torch import nn


C, B = 4, 12


def network(*extra: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), *extra, nn.Tanh(), nn.Linear(6, C)).double()


def data(batch: int = B, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 5, generator=generator).double(), torch.randint(0, C, (batch,), generator=generator)


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def by_loop(model, x, y) -> tuple[torch.Tensor, torch.Tensor]:
    """c_k of equation (1) and the weights of equation (3), example by example."""
    params = list(model.parameters())
    logits = model(x)
    c, weight = torch.zeros(C, sum(p.numel() for p in params)).double(), torch.zeros(C).double()
    for k in range(C):
        members = [m for m in range(len(x)) if y[m] == k]
        for m in members:
            c[k] += flat(torch.autograd.grad(logits[m, k], params, retain_graph=True)) / len(members)
            p = logits[m].softmax(0)[k].detach()
            weight[k] += p * (1 - p) / len(x)
    return c, weight
