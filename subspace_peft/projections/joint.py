"""Joint: the rows of P of several small tensors, applied in one go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_map

from .base import JointCache, Map, Projection, working


SMALL = 2**17  # entries up to which a tensor is made with others: its calls cost as much as its numbers
TOGETHER = 2**18  # entries made in one go: they stay in a core's cache
KEPT = 2**20  # numbers that an adapter keeps: 4 MB
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Joint(ABC):
    """The rows of P of several tensors, its members, as one linear map."""

    def __init__(self, members: Sequence[Projection]):
        # Of its own: graphs hold the joint, and must not through it hold what is kept of them.
        self.members = [type(member)(member.rows) for member in members]
        self.extents = [self.extent(member) for member in members]
        self._drawn: tuple = ()

    @staticmethod
    @abstractmethod
    def extent(member: Projection) -> tuple[int, int]:
        """Entries of the tensor, and entries that are made after them and are none of it."""

    @abstractmethod
    def draw(self, device: torch.device) -> tuple:
        """What apply and adjoint need; its floating-point tensors are put into the dtype that is computed in."""

    @abstractmethod
    def apply(self, z: Tensor) -> Tensor:
        """P z, without derivatives: [..., d] -> [..., sum of the extents]."""

    @abstractmethod
    def adjoint(self, grad: Tensor) -> Tensor:
        """Its transpose, without derivatives."""

    def state(self, x: Tensor) -> tuple:
        """What is drawn, on the device of x and in the dtype that x is computed in."""
        wanted = x.device, working(x).dtype
        if self._drawn[:2] == wanted:
            return self._drawn[2]
        with torch.inference_mode(False), torch.no_grad():
            drawn = tree_map(lambda t: t.to(wanted[1]) if t.is_floating_point() else t, self.draw(x.device))
        if self.members[0].rows.cache:
            self._drawn = *wanted, drawn
        return drawn

    def forget(self) -> None:
        """Drop what is drawn, until it is needed again."""
        self._drawn = ()

    def cut(self, z: Tensor) -> list[Tensor]:
        """P z of each member; the derivative of the cuts is one vector."""
        return Map.apply(z, self, False).split([size for extent in self.extents for size in extent], -1)[::2]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_drawn": ()}


class JointPieces(JointCache):
    """z, which is theta_d normalised, and P z of the small tensors of an adapter, for as long as theta_d is the same.

    Layers ask for one tensor's at a time. Nothing is saved in the graphs of what is kept, so any number of backwards
    may go through them. Whether theta_d is the same its bits say: their version misses what `.data` does to them.
    """

    def __init__(self, groups: Sequence[tuple[Joint, Sequence[Projection]]]):
        self.joints = [joint for joint, _ in groups]
        self._places = {member: (joint, at) for joint, members in groups for at, member in enumerate(members)}
        self._kept: _Kept | None = None
        for member in self._places:
            member.joint_cache = self

    def normalised(self, theta_d: Tensor, scale: Tensor | float) -> Tensor | None:
        """theta_d times the scale; None where it is not to be kept.

        That is for what torch.func and wrappers put in the place of a parameter, in a graph that is traced, and on a
        GPU, which the comparison would make wait.
        """
        if type(theta_d) is not nn.Parameter or _is_traced():
            return None
        if theta_d.device.type != "cpu":
            self._forget()
            return None
        trains = theta_d.requires_grad and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        ends = theta_d, scale, get_gradient_edge(theta_d).node if trains else None
        bits = theta_d.detach().view(BITS[theta_d.itemsize])
        kept = self._kept
        if kept is None or not kept.is_of(ends, theta_d.dtype, bits):
            z = Map.apply(theta_d, _Scale(scale), False)
            self._kept = kept = _Kept(ends, _mode(), theta_d.dtype, bits.clone(), z)
        return kept.z

    def piece(self, z, member):
        if _is_traced():
            return None
        kept = self._kept
        if kept is None or z is not kept.z or kept.mode != _mode():
            return None
        joint, at = self._places[member]
        if joint not in kept.made:
            kept.made[joint] = joint.cut(z)
        return kept.made[joint][at]

    def _forget(self) -> None:
        if self._kept is not None:
            self._kept = None
            for joint in self.joints:
                joint.forget()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": None}


@dataclass
class _Kept:
    ends: tuple  # theta_d, the scale, and where the graph ends: with `.data` of another dtype or device at a new node
    mode: tuple[bool, bool]
    dtype: torch.dtype
    bits: Tensor  # of theta_d: as numbers, nan is never the same
    z: Tensor
    made: dict[Joint, list[Tensor]] = field(default_factory=dict)

    def is_of(self, ends: tuple, dtype: torch.dtype, bits: Tensor) -> bool:
        same = all(one is other for one, other in zip(self.ends, ends, strict=True)) and self.mode == _mode()
        return same and self.dtype == dtype and torch.equal(self.bits, bits)


class _Scale:
    """x -> scale x, its own transpose."""

    def __init__(self, scale: Tensor | float):
        self.scale = scale

    def apply(self, x: Tensor) -> Tensor:
        return x * self.scale

    adjoint = apply


def _mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def gather(kind: type[Joint], projections: Sequence[Projection]) -> JointPieces | None:
    """The small tensors among them, as many in one go as fit; None where none has company."""
    groups, entries = [[]], 0
    kept = 2 * projections[0].rows.d  # z, and the bits of theta_d
    for projection in projections:
        size = sum(kind.extent(projection))
        if size > SMALL or projection.rows.given is not None:
            continue
        if kept + entries + size > KEPT:
            break
        if entries // TOGETHER != (entries + size) // TOGETHER:
            groups.append([])
        entries += size
        groups[-1].append(projection)
    groups = [(kind(group), group) for group in groups if len(group) > 1]
    return JointPieces(groups) if groups else None
