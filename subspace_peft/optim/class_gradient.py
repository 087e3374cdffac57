"""Class gradients: the mean gradient of each class's logit over the examples of the class (Tuddenham et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from .processes import sum_over_processes


IGNORED = -100
"""The label that the losses of torch and transformers leave out."""


@dataclass(frozen=True)
class ClassGradients:
    """The class gradients of one batch, of all processes together."""

    c: Tensor  # [C, n]: for class k the mean gradient of its logit; zero if the batch has no example of the class
    weight: Tensor  # [C]: mean over the batch of y_k p_k (1 - p_k), which counts the examples of class k only
    weight_of_all: Tensor  # [C]: mean over the batch of p_k (1 - p_k), which counts all examples
    count: Tensor  # [C]: examples of each class


def class_gradients(logits: Tensor, labels: Tensor, params: Iterable[Tensor]) -> ClassGradients:
    """c_k = 1 / |D_k| sum_{mu in D_k} grad z_k^mu (equation 1), D_k the examples of class k in the batch.

    One batched vector-Jacobian product computes all classes, or one for each where torch cannot batch them. The result
    also holds the weights of c_k c_k^T in equation (3). The graph is kept.

    Args:
        logits: [..., C], with their graph; examples may have several leading dimensions, such as tokens.
        labels: Integers below C, shaped as the leading dimensions; examples with the label -100 are left out.
        params: Any tensors that the logits depend on, n entries in all: the weights of a network, or theta_d.

    Raises:
        ValueError: if logits and labels do not fit each other, or the logits have no graph, or their graph contains a
            reentrant checkpoint, which hides parameters, so that their gradients would be zero.
    """
    params = list(params)
    _check(logits, labels)
    _check_graph(logits)
    C = logits.shape[-1]
    labels = labels.reshape(-1)
    used = labels != IGNORED
    z, labels = logits.reshape(-1, C)[used], labels[used]
    classes = one_hot(labels, C).to(torch.promote_types(z.dtype, torch.float32))
    counts = sum_over_processes(classes.sum(0))
    # Divided by the counts of all processes, so that the sum over processes is the mean.
    mean_logits = (z * classes / counts.clamp_min(1)).sum(0)
    rows = _jacobian(mean_logits, params)
    rows = [p.new_zeros(C, p.numel()) if row is None else row.flatten(1) for p, row in zip(params, rows, strict=True)]
    probabilities = z.detach().to(classes.dtype).softmax(-1)
    spread = probabilities * (1 - probabilities)
    weight, weight_of_all = (
        sum_over_processes(s.sum(0)) / counts.sum().clamp_min(1) for s in (classes * spread, spread)
    )
    return ClassGradients(sum_over_processes(torch.cat(rows, 1)), weight, weight_of_all, counts)


def _jacobian(outputs: Tensor, params: list[Tensor]) -> list[Tensor | None]:
    """The gradient of each output: [C, *shape of the parameter], None where none depends on it."""
    products = partial(torch.autograd.grad, outputs, params, retain_graph=True, allow_unused=True)
    units = torch.eye(len(outputs), dtype=outputs.dtype, device=outputs.device)
    try:
        return list(products(units, is_grads_batched=True))
    except RuntimeError:
        # vmap takes neither every operation nor random numbers, which a checkpoint with dropout draws again
        rows = zip(*(products(unit) for unit in units), strict=True)
        return [None if row[0] is None else torch.stack(row) for row in rows]


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim < 2 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            "`logits` must be [..., C] and `labels` [...], one class for each row, got "
            f"{list(logits.shape)} and {list(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"`labels` must be whole numbers, the index of a class each, got {labels.dtype}.")
    if not logits.requires_grad:
        raise ValueError(
            "`logits` must come with their graph; do not detach them, and do not compute them in no_grad."
        )
    used = labels[labels != IGNORED]
    if used.numel() and (used.max() >= logits.shape[-1] or used.min() < 0):
        raise ValueError(
            f"`labels` must be at least 0 and below the {logits.shape[-1]} logits (or {IGNORED}, which is left out), "
            f"got {used.min().item()} to {used.max().item()}: more classes than logits; widen the last layer."
        )


def _check_graph(logits: Tensor) -> None:
    """Refuse reentrant checkpoints. torch's `grad` does so only if one of the tensors lies before the checkpoint."""
    nodes, seen = [logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "Class gradients must be computed without reentrant checkpoints, which hide the parameters inside; "
                "checkpoint with use_reentrant=False."
            )
        seen.add(node)
        nodes.extend(previous for previous, _ in node.next_functions)
