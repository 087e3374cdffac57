"""Sensitivity: how far the outputs of a model move with theta_d, from which its learning rate follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from .evaluation import are_logits, evaluating, moved, output_rows, run, same_random, tokens_of_loss
from .optim.processes import process_count, sum_over_processes
from .plain_model import HasSubstitutes, unwrapped


CHANGES = (0.1, 1.0)
"""The relative changes at which it is measured: outputs are about linear at a tenth, B A is steeper at one."""
NEAR = (3.0, 1.5)
"""It is measured at a change from CHANGES / NEAR to CHANGES * NEAR."""
REACH = 3.0
"""The relative change up to which the steepest counts, by a power law from CHANGES on; some outputs end before."""
LEAST_SPREAD = 1.0
"""Of logits: those of a network that is not trained vary by less, and have to move by about this."""
DIRECTIONS = 2
TRIALS = 12  # of a length, for each direction
FIRST = 1e-3


def is_theta_d(name: str) -> bool:
    return ".subspace_peft_theta_d." in f".{name}"


def trained_theta_d(model: nn.Module) -> list[nn.Parameter]:
    """theta_d of each adapter that trains.

    Raises:
        ValueError: if there is none.
    """
    theta_d = [p for name, p in model.named_parameters() if p.requires_grad and is_theta_d(name)]
    if not theta_d:
        raise ValueError(
            "The model must have a trainable theta_d, it has none; wrap it with a SubspaceConfig, or load its adapter "
            "with `is_trainable=True`."
        )
    return theta_d


class Sensitivity(NamedTuple):
    """How far the outputs move with what trains.

    Args:
        theta_d: The relative change of the outputs for a step of theta_d in a random direction, by the size of its
            entries: s = |f(theta_d + sigma z) - f(theta_d)| / (sigma |f(theta_d) - mean f|), z normal in R^d, the
            largest for s sigma from a tenth to three. The mean of f is over the batch. Logits that vary by less than
            LEAST_SPREAD count as if they varied by that, unless a head trains whole; the farthest change is then three
            times what they do vary by, or LEAST_SPREAD if that is more.
        head: The change of a head's outputs for a step of its weights, by the size of their entries: the mean over its
            inputs x of |x|_1, or of |x - mean x|_1 if that is larger. None without a head that floats enter.
        d: The number of entries of theta_d that the outputs depend on.
    """

    theta_d: float
    head: float | None
    d: int


@torch.no_grad()
def sensitivity(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] = run) -> Sensitivity:
    """How far the outputs of a model move with theta_d and with a head, for one batch.

    The outputs are `logits`, or the first tensor, or what enters the last module that is trained whole, whichever
    changes more: a new head may be 0. It takes five to twenty-five evaluations; the model and torch's random numbers
    are left as they were. theta_d is not written to, so the model may be sharded: all processes call this.

    Args:
        batch: The arguments of the model: a mapping, a tuple or a tensor, of at least two samples (or tokens).
        forward: What gives the outputs of the model for the batch. Default: the model itself.

    Raises:
        ValueError: if no theta_d trains, or the outputs do not depend on theta_d or on the sample. With several
            processes all raise it, or none.
    """
    like = trained_theta_d(model)[0]
    model = unwrapped(model)
    if not like.is_meta:  # else accelerate moves the batch too
        batch = moved(batch, like.device)
    # compiled blocks would be compiled once more, for these evaluations
    as_written = torch.compiler.set_stance("force_eager")
    tokens = tokens_of_loss(batch)
    with as_written, evaluating(model), _seen(model) as places, _substitutes(model) as substitutes:

        def outputs() -> tuple[list[Tensor], bool]:
            places.clear()
            with same_random(model):
                output = forward(model, batch)
            rows = output_rows(output, [place.features for place in places[-1:]], tokens)
            return rows, are_logits(output) and not places

        start, of_classes = outputs()
        known = [f.isfinite() for f in start]  # logits may be -inf for classes that a model excludes
        start = [f.where(at, 0) for f, at in zip(start, known, strict=True)]
        sizes, share = _sizes(start, known, of_classes)
        if not _mean(any(sizes), like):
            raise ValueError(
                "A batch must have samples with different outputs, "
                f"{'all of this one are the same' if start else 'the model returned no tensor of floats'}; give more "
                "samples, or a learning rate (of TrainingArguments: `per_device_train_batch_size`, `learning_rate`)."
            )
        farthest = max(REACH * _mean(share, like), CHANGES[-1])
        theta_d = _acting(substitutes)
        before = [vector.clone() for vector in theta_d]

        def change(direction: list[Tensor], sigma: float) -> float:
            for vector, old, z in zip(theta_d, before, direction, strict=True):
                vector.copy_(old + sigma * z)
            ends = [f.where(at, 0) for f, at in zip(outputs()[0], known, strict=True)]
            changes = [_norm(f - f_0) / size for f, f_0, size in zip(ends, start, sizes, strict=True) if size]
            return _mean(max(changes, default=None), like)

        slopes = [_slope(change, direction, farthest) for direction in _directions(theta_d)]
    head = places[-1].volume * _mean_length(start[-1]) if places else None
    return Sensitivity(sum(slopes) / len(slopes), _mean(head, like) or None, sum(vector.numel() for vector in before))


def _sizes(start: list[Tensor], known: list[Tensor], of_classes: bool) -> tuple[list[float], float | None]:
    """What each output counts as varying by, logits by at least LEAST_SPREAD each, and the share of that it does."""
    sizes, share = [_spread(f) for f in start], 1.0
    if start and of_classes and known[0].any() and _have_unit(start[0]) and (sizes[0] or not start[0].any()):
        least = LEAST_SPREAD * math.sqrt(known[0].sum())
        share, sizes[0] = min(sizes[0] / least, 1.0), max(sizes[0], least)
    return sizes, share if any(sizes) else None


def _mean(value: float | None, like: Tensor) -> float:
    """The mean over those processes that have a value; 0 if none has."""
    if process_count() == 1:
        return value or 0.0
    found = torch.tensor([value or 0.0, value is not None], dtype=torch.float32, device=like.device)
    total, count = sum_over_processes(found).tolist()
    return total / count if count else 0.0


class _Substitute:
    """What stands for the theta_d of adapters that train, in one module: copies, made of what a first run reads."""

    def __init__(self, module: HasSubstitutes):
        trained = (name for name, p in module.named_parameters() if p.requires_grad and is_theta_d(name))
        self.adapters = [name.split(".")[-2] for name in trained]
        self.read: dict[str, Tensor] = {}
        self.copies: dict[str, nn.Parameter] = {}

    def __call__(self, adapter: str, theta_d: Tensor) -> Tensor:
        if adapter in self.copies:
            return self.copies[adapter]
        if adapter in self.adapters and adapter not in self.read:
            self.read[adapter] = theta_d.clone()
        return theta_d

    def act(self) -> list[nn.Parameter]:
        """Let copies act from now on, in the order of the adapters."""
        read = (adapter for adapter in self.adapters if adapter in self.read)
        self.copies = {adapter: nn.Parameter(self.read[adapter], requires_grad=False) for adapter in read}
        return list(self.copies.values())


@contextmanager
def _substitutes(model: nn.Module) -> Iterator[list[_Substitute]]:
    modules = [module for module in model.modules() if isinstance(module, HasSubstitutes)]
    try:
        for module in modules:
            module.substitute = _Substitute(module)
        yield [module.substitute for module in modules]
    finally:
        for module in modules:
            del module.substitute


def _acting(substitutes: list[_Substitute]) -> list[nn.Parameter]:
    """The copies of each theta_d that a run has read, which act from now on."""
    theta_d = [vector for substitute in substitutes for vector in substitute.act()]
    if not theta_d:
        raise ValueError(
            "The outputs must depend on theta_d to find its learning rate, but no run of the model reads it: its "
            "adapter is merged, disabled or not active, or none of its targets runs; change that, or give a rate."
        )
    return theta_d


def _directions(theta_d: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """The same on every process and device, without torch's own random numbers."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(DIRECTIONS):
        yield [torch.randn(vector.shape, generator=generator).to(vector) for vector in theta_d]


def _slope(change, direction: list[Tensor], farthest: float) -> float:
    """The largest change over sigma, for changes from CHANGES[0] to the farthest, by a power law from two of them."""
    found_near, sigma, near = _trial(change, direction, CHANGES[0], NEAR[0], FIRST)
    if not found_near:
        raise ValueError(
            "The outputs must depend on theta_d smoothly to find its learning rate, their relative change with "
            f"entries of {sigma:.1e} is {near:.1e}; give a rate."
        )
    found_far, at, far = _trial(change, direction, CHANGES[1], NEAR[1], sigma * CHANGES[1] / near)
    if not found_far:
        return near / sigma
    growth = math.log(far / at * sigma / near, far / near)  # of the slope, with the change
    return max(near / sigma, far / at * (farthest / far) ** growth)


def _trial(change, direction: list[Tensor], wanted: float, near: float, sigma: float) -> tuple[bool, float, float]:
    """Whether there is a sigma with a change near to that, and the last sigma that was tried with its change."""
    low, high = 0.0, math.inf
    for _ in range(TRIALS):
        at, found = sigma, change(direction, sigma)
        if wanted / near <= found <= wanted * near:
            return True, at, found
        low, high = (sigma, high) if found < wanted else (low, sigma)
        ratio = wanted / found if math.isfinite(found) and found > 0 else 0.01 if found else 1000.0
        sigma *= min(max(ratio, 1e-3), 1e3)
        if low and high < math.inf:  # a line through 0 may miss by ever less of what is between them
            sigma = math.sqrt(low * high)
    return False, at, found


class _Place(NamedTuple):
    """What entered a head: [..., features], and how many of these its outputs read."""

    features: Tensor
    volume: int  # of a convolution's kernel


@contextmanager
def _seen(model: nn.Module) -> Iterator[list[_Place]]:
    """What entered the modules that are trained whole in the last run, where they are called with floats."""
    places: list[_Place] = []

    def hook(wrapper: nn.Module, args: tuple, kwargs: dict) -> None:
        value = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if value is not None and value.is_floating_point():
            head = wrapper.original_module
            kernel = head.kernel_size if isinstance(head, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else ()
            places.append(_Place(value.movedim(-1 - len(kernel), -1), math.prod(kernel)))

    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    handles = [wrapper.register_forward_pre_hook(hook, with_kwargs=True) for wrapper in wrappers]
    try:
        yield places
    finally:
        for handle in handles:
            handle.remove()


def _have_unit(f: Tensor) -> bool:
    """Whether these are logits of several classes: no prediction of one number, no directions, no probabilities."""
    if not f.numel():
        return False
    lengths = torch.linalg.vector_norm(f, dim=1)
    are_directions, are_shares = (lengths - 1).abs().max() < 0.02, (f.sum(1) - 1).abs().max() < 0.02 and f.min() >= 0
    return f.shape[1] > 1 and not are_directions and not are_shares


def _spread(f: Tensor) -> float:
    """How far the outputs of samples are from their mean; 0 if that is rounding alone."""
    spread = _norm(f - f.mean(0))
    return spread if spread > 10 * torch.finfo(f.dtype).eps * _norm(f) else 0.0


def _mean_length(x: Tensor) -> float:
    """The mean of |x|_1, or of what differs from the mean of x, if that is longer."""
    return max(each.abs().sum(1).mean().item() for each in (x, x - x.mean(0)))


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).item()
