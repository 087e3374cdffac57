"""Joint: the rows of P of several small tensors, applied at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_map

from .base import JointCache, Map, Projection, to_working_dtype
from .recorded import is_transformed


MEMBER_ENTRIES = 2**17  # the largest tensor that joins others: above, the arithmetic takes longer than the calls
JOINT_ENTRIES = 2**18  # computed at once: they stay in a core's cache
CACHE_ENTRIES = 2**20  # held for one adapter: 4 MB
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers of the size of a dtype


class Joint(ABC):
    """The rows of P of several tensors, its members, as one linear map."""

    def __init__(self, members: Sequence[Projection]):
        # Copies: autograd graphs hold the joint and must not keep cached tensors alive through it.
        self.members = [type(member)(member.rows) for member in members]
        self.extents = [self.extent(member) for member in members]
        self._drawn: tuple = ()

    @staticmethod
    @abstractmethod
    def extent(member: Projection) -> tuple[int, int]:
        """The entries of the tensor, and the entries of padding that the joint computes after them."""

    @abstractmethod
    def draw(self, device: torch.device) -> tuple:
        """Draw the state: what apply and adjoint need. `state` converts its floating-point tensors."""

    @abstractmethod
    def apply(self, z: Tensor) -> Tensor:
        """P z, without derivatives: [..., d] -> [..., sum of the extents]."""

    @abstractmethod
    def adjoint(self, grad: Tensor) -> Tensor:
        """The transpose of `apply`, without derivatives."""

    def state(self, x: Tensor) -> tuple:
        """The drawn state, on the device of x and in the dtype in which x is computed."""
        key = x.device, to_working_dtype(x).dtype
        if self._drawn[:2] == key:
            return self._drawn[2]
        with torch.inference_mode(False), torch.no_grad():
            drawn = tree_map(lambda t: t.to(key[1]) if t.is_floating_point() else t, self.draw(x.device))
        if self.members[0].rows.cache:
            self._drawn = *key, drawn
        return drawn

    def forget(self) -> None:
        """Drop the state until it is needed again."""
        self._drawn = ()

    def split(self, z: Tensor) -> list[Tensor]:
        """P z of each member; their backward pass makes one vector for all of them."""
        return Map.apply(z, self, False).split([size for extent in self.extents for size in extent], -1)[::2]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_drawn": ()}


class ProductCache(JointCache):
    """z = scale * theta_d, and P z of the small tensors of an adapter, held as long as theta_d stays the same.

    Each layer asks for one tensor. The graphs of the held tensors save nothing, so any number of backward passes may
    go through them. Changes of theta_d are seen by its bits: its version counter misses what happens through `.data`.
    """

    def __init__(self, groups: Sequence[tuple[Joint, Sequence[Projection]]]):
        self.joints = [joint for joint, _ in groups]
        self._places = {member: (joint, i) for joint, members in groups for i, member in enumerate(members)}
        self._products: _Products | None = None
        for member in self._places:
            member.joint_cache = self

    def normalised(self, theta_d: Tensor, scale: Tensor | float) -> Tensor | None:
        """z; None where it cannot be held.

        That is for what torch.func and wrappers put in the place of a parameter, in a graph that is traced, on a GPU,
        where the host would have to wait for the comparison, and in float64, because a tensor computed alone may have
        its rows in float32, which would differ.
        """
        if type(theta_d) is not nn.Parameter or is_transformed():
            return None
        if theta_d.device.type != "cpu" or theta_d.dtype == torch.float64:
            self._forget()
            return None
        trains = theta_d.requires_grad and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        ends = theta_d, scale, get_gradient_edge(theta_d).node if trains else None
        bits = theta_d.detach().view(BITS[theta_d.itemsize])
        products = self._products
        if products is None or not products.are_of(ends, theta_d.dtype, bits):
            z = Map.apply(theta_d, _Scale(scale), False)
            self._products = products = _Products(ends, _mode(), theta_d.dtype, bits.clone(), z)
        return products.z

    def entries(self, z, member):
        if is_transformed():
            return None
        products = self._products
        if products is None or z is not products.z or products.mode != _mode():
            return None
        joint, i = self._places[member]
        if joint not in products.by_joint:
            products.by_joint[joint] = joint.split(z)
        return products.by_joint[joint][i]

    def _forget(self) -> None:
        if self._products is not None:
            self._products = None
            for joint in self.joints:
                joint.forget()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_products": None}


@dataclass
class _Products:
    """z and P z, and what they were made from."""

    ends: tuple  # theta_d, the scale, and the node where the graph ends, new after `.data` of another dtype or device
    mode: tuple[bool, bool]
    dtype: torch.dtype
    bits: Tensor  # of theta_d, as integers: nan does not equal itself
    z: Tensor
    by_joint: dict[Joint, list[Tensor]] = field(default_factory=dict)

    def are_of(self, ends: tuple, dtype: torch.dtype, bits: Tensor) -> bool:
        same = all(one is other for one, other in zip(self.ends, ends, strict=True)) and self.mode == _mode()
        return same and self.dtype == dtype and torch.equal(self.bits, bits)


class _Scale:
    """x -> scale x, which is its own transpose."""

    def __init__(self, scale: Tensor | float):
        self.scale = scale

    def apply(self, x: Tensor) -> Tensor:
        return x * self.scale

    adjoint = apply


def _mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def cache_products(kind: type[Joint], projections: Sequence[Projection]) -> ProductCache | None:
    """A cache for the small tensors among these, in as few joints as fit; None if no joint has two members."""
    groups, entries = [[]], 0
    held = 2 * projections[0].rows.d  # z, and the bits of theta_d
    for projection in projections:
        size = sum(kind.extent(projection))
        if size > MEMBER_ENTRIES or projection.rows.given is not None:
            continue
        if held + entries + size > CACHE_ENTRIES:
            break
        if entries // JOINT_ENTRIES != (entries + size) // JOINT_ENTRIES:
            groups.append([])
        entries += size
        groups[-1].append(projection)
    groups = [(kind(group), group) for group in groups if len(group) > 1]
    return ProductCache(groups) if groups else None
