"""Training several runs at once that share one P: they differ in seed, or in d where the columns of P are nested.

    weights [R, ...] = origins [R, ...] + P [theta_1 ... theta_R]

P is drawn once and applied to all theta_d at once. With the dense projection, the columns for a smaller d are the
first columns for a larger one, so a shorter theta_d is padded with zeros. The networks run side by side under
`torch.func.vmap` where that is faster, and one after the other elsewhere. Each run keeps the origin, batches, schedule
and measurements that it would have alone, so its result is that of `recipes.training.train.train` up to rounding.

One P is one draw: a probability over subspaces, as in Larsen et al. 2021, needs another P for each run.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from recipes.tasks.data import Split, batches
from recipes.tasks.models import MODELS, build
from recipes.training.optimizers import OPTIMIZERS, scheduled
from recipes.training.settings import Settings
from recipes.training.train import evaluated_accuracy, finite, inputs, measured, measured_on, origin, outcome, wrap
from subspace_peft.adapter.walk import find_vectors, unique_coordinates


ELEMENTWISE = ("sgd", "adam", "adamw", "adam_larsen")
"""Optimisers that move each entry by the gradients of that entry alone, so that the rows of [R, d] do not mix."""
FULLY_CONNECTED = (nn.Sequential, nn.Flatten, nn.Linear, nn.ReLU)
"""Networks of these modules run side by side on a CPU; for other modules the batched kernels are slower there."""


def alike(settings: Settings) -> Settings | None:
    """The settings that a run shares with all runs it can be trained with; None: it is trained alone."""
    shared = settings.projection_seed >= 0 and settings.optimizer in ELEMENTWISE and not settings.save_adapter
    if not shared or not _has_parameters_alone(settings.model, settings.dataset):
        return None
    nested = settings.projection == "dense" and settings.normalization == "columns"
    return replace(settings, seed=0, d=1 if nested else settings.d)


@cache
def _has_parameters_alone(model: str, dataset: str) -> bool:
    """False for networks whose training also changes statistics, and for timm's, which are not built to find out."""
    return model in MODELS and not any(True for _ in build(model, dataset).buffers())


def train_together(
    runs: list[Settings],
    accelerator: Accelerator,
    training: Split,
    test: Split,
    report: Callable[[float], None] = lambda accuracy: None,
) -> list[dict[str, Any]]:
    """The result of each run as `train` gives it, the seconds being a share of 1 / R, and "together", which is R.

    Raises:
        ValueError: if the runs are not alike.
    """
    first, start = runs[0], time.perf_counter()
    if alike(first) is None or len({alike(run) for run in runs}) > 1:
        raise ValueError(
            "Runs trained together must have one `projection_seed` >= 0 and differ in `seed`, or in `d` of dense in "
            f"unit columns, alone, got {', '.join(map(str, runs))}; train them one by one."
        )
    training, test = inputs(first, training, test)
    networks = Networks(runs, training, accelerator.device)
    optimizer = OPTIMIZERS[first.optimizer](nn.ParameterList([networks.theta_d]), first)
    schedule = scheduled(optimizer, first, first.epochs * (len(training.labels) // first.batch_size))
    seconds = {"setup": (time.perf_counter() - start) / len(runs), "train": 0.0}
    shown = measured_on(first, training, test)
    at_origin = networks.measured(shown) if first.measured else None

    randoms, epochs = [torch.Generator().manual_seed(run.seed) for run in runs], [[] for _ in runs]
    for _ in range(first.epochs):
        start, losses = time.perf_counter(), []
        for index in zip(*(batches(len(training.labels), first.batch_size, r) for r in randoms), strict=True):
            losses.append(networks.backward(*_batch(training, index, randoms if first.augment else None)))
            optimizer.step()
            schedule.step()
        means = torch.stack(losses).mean(0).tolist()
        seconds["train"] += (time.perf_counter() - start) / len(runs)
        for record, loss, values in zip(epochs, means, networks.measured(shown), strict=True):
            record.append({"train_loss": finite(loss)} | values | {"seconds": round(seconds["train"], 3)})
            report(values["test_accuracy"])

    finals = [evaluated_accuracy(logits, test) for logits in networks.predict(test)]
    return [
        outcome(networks.D, run.d, finals[r], {"origin": at_origin[r]} if at_origin else {}, epochs[r], seconds, 1)
        | {"together": len(runs)}
        for r, run in enumerate(runs)
    ]


def _batch(training: Split, index: tuple[Tensor, ...], randoms: list[torch.Generator] | None) -> tuple[Tensor, Tensor]:
    """A batch of each run: images [R, B, ...] and labels [R, B]."""
    if randoms is None:
        return training.batch(torch.stack(index))
    parts = [training.batch(*each) for each in zip(index, randoms, strict=True)]
    return tuple(torch.stack(part) for part in zip(*parts, strict=True))


Tensors = dict[str, Tensor]
"""By the name of the parameter."""


class Networks:
    """R networks, each moved from its own origin by its own theta_d, in one subspace."""

    def __init__(self, runs: list[Settings], training: Split, device: torch.device):
        networks = [origin(run, training, None, device).to(device).requires_grad_(False) for run in runs]
        named = [dict(network.named_parameters()) for network in networks]
        self.network = networks[0]
        self.origins = {name: torch.stack([parameters[name] for parameters in named]) for name in named[0]}
        self.D = sum(parameter.numel() for parameter in self.network.parameters())
        widest = max(runs, key=lambda run: run.d)
        wrapped = wrap(copy.deepcopy(self.network), widest)
        self.projections = {name: c.projections[""] for name, c in unique_coordinates(wrapped, "default").items()}
        columns = torch.arange(widest.d) < torch.tensor([[run.d] for run in runs])
        self.scale = (columns * find_vectors(wrapped).scales["default"]).to(
            device
        )  # the columns of each run, normalised
        self.theta_d = nn.Parameter(torch.zeros(len(runs), widest.d, device=device))
        connected = all(isinstance(module, FULLY_CONNECTED) for module in self.network.modules())
        self.side_by_side = connected or device.type != "cpu"

    def backward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The losses [R] on a batch of each run; their gradients go to theta_d.grad."""
        weights = self.weights()
        losses, gradients = (self._side_by_side if self.side_by_side else self._in_turn)(weights, images, labels)
        pairs = zip(self.projections.values(), gradients, strict=True)
        self.theta_d.grad = self.scale * sum(P.adjoint(gradient.flatten(1)) for P, gradient in pairs)
        return losses

    def _side_by_side(self, weights: Tensors, images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        for weight in weights.values():
            weight.requires_grad_()
        losses = vmap(self._loss)(weights, images, labels)
        return losses.detach(), torch.autograd.grad(losses.sum(), list(weights.values()))

    def _in_turn(self, weights: Tensors, images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        losses, gradients = [], []
        for tensors, *batch in zip(self._each(weights), images, labels, strict=True):
            for weight in tensors.values():
                weight.requires_grad_()
            loss = self._loss(tensors, *batch)
            losses.append(loss.detach())
            gradients.append(torch.autograd.grad(loss, list(tensors.values())))
        return torch.stack(losses), [torch.stack(parts) for parts in zip(*gradients, strict=True)]

    @torch.no_grad()
    def predict(self, split: Split) -> Tensor:  # [R, N, classes]
        weights, logits = self.weights(), []
        for index in torch.arange(len(split.labels)).split(1000):
            images, _ = split.batch(index)
            if self.side_by_side:
                logits.append(vmap(self._logits, in_dims=(0, None))(weights, images))
            else:
                logits.append(torch.stack([self._logits(tensors, images) for tensors in self._each(weights)]))
        return torch.cat(logits, 1)

    def measured(self, shown: list[Split]) -> list[dict[str, float | None]]:
        logits = [self.predict(split) for split in shown]
        return [measured(shown, list(parts)) for parts in zip(*logits, strict=True)]

    @torch.no_grad()
    def weights(self) -> Tensors:
        """origins + P theta_d, copied: [R, ...]"""
        z, pairs = self.theta_d * self.scale, self.projections.items()
        return {name: P.apply(z).view_as(self.origins[name]).add_(self.origins[name]) for name, P in pairs}

    def _each(self, weights: Tensors) -> list[Tensors]:
        rows = zip(*(weight.unbind() for weight in weights.values()), strict=True)
        return [dict(zip(weights, row, strict=True)) for row in rows]

    def _logits(self, weights: Tensors, images: Tensor) -> Tensor:
        return functional_call(self.network, weights, (images,))

    def _loss(self, weights: Tensors, images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self._logits(weights, images), labels)
