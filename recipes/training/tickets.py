"""Pruning: which weights stay, and the network without the others (Frankle and Carbin 2019)."""

import torch
from torch import Tensor, nn


Mask = dict[str, Tensor]
"""By the name of the parameter: bool, of its shape, True where the weight stays."""


def lottery_ticket(trained: dict[str, Tensor], d: int) -> Mask:
    """The d weights and biases of largest magnitude over all tensors of a trained network."""
    return _mask(trained, torch.cat([w.abs().flatten() for w in trained.values()]).topk(d).indices)


def random_ticket(network: nn.Module, d: int, seed: int) -> Mask:
    """d weights and biases, every choice equally probable."""
    parameters = dict(network.named_parameters())
    D = sum(p.numel() for p in parameters.values())
    return _mask(parameters, torch.randperm(D, generator=torch.Generator().manual_seed(seed))[:d])


@torch.no_grad()
def prune(network: nn.Module, mask: Mask) -> None:
    """Sets the weights that do not stay to zero."""
    for name, parameter in network.named_parameters():
        parameter.mul_(mask[name].to(parameter.device))


def _mask(tensors: dict[str, Tensor], positions: Tensor) -> Mask:
    flat = torch.zeros(sum(t.numel() for t in tensors.values()), dtype=torch.bool)
    flat[positions.cpu()] = True
    parts = flat.split([t.numel() for t in tensors.values()])
    return {name: part.view(t.shape) for (name, t), part in zip(tensors.items(), parts, strict=True)}
