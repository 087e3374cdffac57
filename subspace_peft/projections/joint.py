"""Joint: the rows of P of several small tensors, applied in one go."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .base import Map, Pieces, Projection, working


SMALL = 2**17  # entries up to which a tensor is made with others: its calls cost as much as its numbers
TOGETHER = 2**18  # entries made in one go: they stay in a core's cache
KEPT = 2**20  # entries that an adapter keeps: 4 MB


class Joint(ABC):
    """The rows of P of several tensors, its members, as one linear map."""

    def __init__(self, members: Sequence[Projection]):
        self.members = list(members)
        self.extents = [self.extent(member) for member in members]
        self._drawn: tuple = ()

    @staticmethod
    @abstractmethod
    def extent(member: Projection) -> tuple[int, int]:
        """Entries of the tensor, and entries that are made after them and are none of it."""

    @abstractmethod
    def draw(self, device: torch.device) -> tuple:
        """What apply and adjoint need; tensors that do not depend on the dtype computed in have none of its kind."""

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
        if self.members[0].block.cache:
            self._drawn = *wanted, drawn
            for member in self.members:  # what is drawn for one alone is seldom needed
                member.forget()
        return drawn

    def pieces(self, z: Tensor) -> dict[Projection, Tensor]:
        """P z of each member; the derivative of the cuts is one vector."""
        made = Map.apply(z, self, False).split([size for extent in self.extents for size in extent], -1)
        return dict(zip(self.members, made[::2], strict=True))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_drawn": ()}


class JointPieces(Pieces):
    """z, which is theta_d normalised, and P z of the small tensors of an adapter, for as long as theta_d is the same.

    Layers ask for one tensor's at a time. Nothing is saved in the graphs of what is kept, so any number of backwards
    may go through them. Whether theta_d is the same its numbers say: their version misses what `.data` does to them.
    """

    def __init__(self, joints: Iterable[Joint]):
        self.joints = list(joints)
        self._joint_of = {member: joint for joint in self.joints for member in joint.members}
        self._kept: _Kept | None = None
        for member in self._joint_of:
            member.pieces = self

    def normalised(self, theta_d: Tensor, factor: Tensor | float) -> Tensor | None:
        """theta_d times the factor; None where it is not to be kept.

        That is for what torch.func and wrappers put in the place of a parameter, in a graph of torch.compile, and on
        a GPU, which the comparison would make wait.
        """
        if type(theta_d) is not nn.Parameter or theta_d.device.type != "cpu":
            return None
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return None
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), theta_d.requires_grad
        kept = self._kept  # one look: another thread may exchange it
        if kept is None or not kept.is_of(theta_d, factor, mode):
            z = Map.apply(theta_d, _Scale(factor), False)
            self._kept = kept = _Kept(theta_d, theta_d.detach().clone(), factor, mode, z)
        return kept.z

    def piece(self, z, member):
        if torch.compiler.is_compiling():
            return None
        kept = self._kept
        if kept is None or z is not kept.z:
            return None
        joint = self._joint_of[member]
        if joint not in kept.made:
            kept.made[joint] = joint.pieces(z)
        return kept.made[joint][member]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": None}


@dataclass
class _Kept:
    theta_d: nn.Parameter
    numbers: Tensor
    factor: Tensor | float
    mode: tuple[bool, ...]
    z: Tensor
    made: dict[Joint, dict[Projection, Tensor]] = field(default_factory=dict)

    def is_of(self, theta_d: nn.Parameter, factor: Tensor | float, mode: tuple[bool, ...]) -> bool:
        same = theta_d is self.theta_d and factor is self.factor and mode == self.mode
        return same and torch.equal(theta_d, self.numbers)


class _Scale:
    """x -> factor x, its own transpose."""

    def __init__(self, factor: Tensor | float):
        self.factor = factor

    def apply(self, x: Tensor) -> Tensor:
        return x * self.factor

    adjoint = apply


def gather(kind: type[Joint], projections: Sequence[Projection]) -> JointPieces | None:
    """The small tensors among them, as many in one go as fit; None where none has company."""
    groups, entries = [[]], 0
    for projection in projections:
        size = sum(kind.extent(projection))
        if size > SMALL or projection.block.given is not None:
            continue
        if entries // TOGETHER != (entries + size) // TOGETHER:
            groups.append([])
        entries += size
        if entries > KEPT:
            break
        groups[-1].append(projection)
    joints = [kind(group) for group in groups if len(group) > 1]
    return JointPieces(joints) if joints else None
