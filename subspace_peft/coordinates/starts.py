"""Starts: the factors of a low-rank tensor at theta_d = 0."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from ..projections.philox import Philox


Factors = tuple[Tensor | None, ...]
"""Left, inner where there are three, right; None is zero."""

OUTER = (".U", ".V")
"""Suffixes of the outer two of three factors."""


@dataclass(frozen=True)
class Shape:
    """Of the factors of one tensor, read as a matrix of its first dimension by the rest."""

    rows: int
    columns: int
    rank: int
    factors: int = 2  # 2: B A; 3: U W V with W [rank, rank]

    @classmethod
    def of(cls, tensor: tuple[int, ...], rank: int, factors: int) -> Shape:
        return cls(tensor[0], prod(tensor[1:]), rank, factors)

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        """Suffix and shape of each factor, from left to right."""
        if self.factors == 2:
            return {".B": (self.rows, self.rank), ".A": (self.rank, self.columns)}
        return {".U": (self.rows, self.rank), ".W": (self.rank, self.rank), ".V": (self.rank, self.columns)}


class Start(ABC):
    """The factors of one tensor at theta_d = 0, drawn from the seed where the base's weight does not give them.

    Args:
        name: Of the tensor in the base model.
        scaling: alpha / rank, by which the product of the factors is multiplied.
    """

    replaces = True
    """Whether the product stands for the weight itself, or is added to it."""

    def __init__(self, name: str, shape: Shape, scaling: float, seed: int, version: int):
        self.name, self.shape, self.scaling = name, shape, scaling
        self._seed, self._version = seed, version
        self._drawn: dict[torch.device, Factors] = {}
        self.state: dict[str, Tensor] | None = None  # what the base's weight gave, and the adapter's file holds

    def measure(self, weight: Tensor) -> None:
        """Take from the base's weight what the seed does not give.

        Raises:
            ValueError: if the weight is not finite.
        """
        self.state = {}

    def _finite(self, weight: Tensor) -> Tensor:
        if not weight.isfinite().all():
            raise ValueError(f"A weight must be finite to be replaced, `{self.name}` is not; look at the base model.")
        return weight.detach()

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors in `state`."""
        return {}

    def saved(self) -> dict[str, Tensor]:
        """What the adapter's file must hold, beside theta_d.

        Raises:
            ValueError: if it was to come with such a file, and did not.
        """
        if self.state is None:
            raise ValueError(
                f"The start of the factors of `{self.name}` must come with the adapter's file, and was not read. "
                "transformers' own load_adapter takes theta_d alone: use PeftModel.from_pretrained(model, dir). A "
                "config that was used before is of that adapter: for a new one make a new SubspaceConfig."
            )
        return self.state

    def load(self, state: dict[str, Tensor]) -> None:
        """Take it from an adapter's file instead of from the base."""
        self.state = state
        self._drawn.clear()

    @abstractmethod
    def draw(self, device: torch.device) -> Factors:
        """The factors, float32."""

    def __call__(self, device: torch.device) -> Factors:
        if device not in self._drawn:
            self.saved()  # or an error that says where it must come from
            with torch.inference_mode(False), torch.no_grad():
                self._drawn = {device: self.draw(device)}
        return self._drawn[device]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_drawn": {}}

    def philox(self, purpose: str) -> Philox:
        return Philox(self._seed, self.name, f"LowRank:{purpose}", self._version)

    def orthonormal(self, purpose: str, rows: int, columns: int) -> Tensor:
        """Columns that are orthonormal, from Haar measure (Mezzadri 2007): float64 [rows, columns] on the CPU."""
        Q, R = torch.linalg.qr(self.normal(purpose, rows, columns))
        return Q * R.diagonal().sign()

    def normal(self, purpose: str, rows: int, columns: int) -> Tensor:
        """float64 [rows, columns] on the CPU."""
        return self.philox(purpose).normals(0, rows * columns)[0].double().view(rows, columns)


class Increment(Start):
    """The product is zero and its gradient is not: of two factors B_0 = 0, of three W_0 = 0.

    A_0 is uniform in +-1 / sqrt(columns), as LoRA's (Hu et al. 2021) is; U_0 has orthonormal columns, V_0 rows.
    """

    replaces = False

    def draw(self, device):
        rows, columns, rank = self.shape.rows, self.shape.columns, self.shape.rank
        if self.shape.factors == 2:
            uniforms = self.philox("A").uniforms(0, rank * columns, device)
            return None, (2 * uniforms - 1).view(rank, columns) / sqrt(columns)
        U, V = self.orthonormal("U", rows, rank), self.orthonormal("V", columns, rank).mT.contiguous()
        return U.float().to(device), None, V.float().to(device)


class Drawn(Start):
    """Factors of W that the seed gives, their product of the Frobenius norm of the weight that it stands for.

    Two factors share that norm; of three the inner one has it.
    """

    def measure(self, weight):
        self.state = {"norm": self._finite(weight).double().norm().view(1).cpu()}

    def state_shapes(self):
        return {"norm": (1,)}

    @abstractmethod
    def direction(self) -> list[Tensor]:
        """The factors but for their norm: float64 on the CPU."""

    def draw(self, device):
        factors = self.direction()
        product = factors[0] if len(factors) == 2 else factors[0] @ factors[1]
        # the Frobenius norm of a product of thin matrices, without the product
        norm = (product.mT @ product @ (factors[-1] @ factors[-1].mT)).trace().sqrt()
        ratio = (self.state["norm"].cpu() / (norm * abs(self.scaling))).squeeze()
        if len(factors) == 2 and ratio == 0:  # a weight of zeros: as an increment starts, or nothing would train
            factors = [factors[0] / factors[0].norm() * self.shape.rank**0.5, factors[1] * 0]
        elif len(factors) == 2:
            factors = [factor * ratio.sqrt() for factor in factors]
        else:
            factors[1] = factors[1] * ratio
        return tuple(factor.float().to(device) for factor in factors)


class Orthogonal(Drawn):
    """B_0 with orthonormal columns and A_0 with orthonormal rows, to a factor; U_0, V_0 likewise around c I."""

    def direction(self):
        rows, columns, rank = self.shape.rows, self.shape.columns, self.shape.rank
        left, right = self.orthonormal("left", rows, rank), self.orthonormal("right", columns, rank).mT
        return [left, right] if self.shape.factors == 2 else [left, torch.eye(rank, dtype=left.dtype), right]


class Random(Drawn):
    """Gaussian factors."""

    def direction(self):
        return [self.normal(suffix, *shape) for suffix, shape in self.shape.parts.items()]


class TruncatedSVD(Start):
    """The best approximation of the weight by a matrix of this rank (Eckart and Young 1936).

    B_0 = U sqrt(S), A_0 = sqrt(S) V^T, or U, S, V^T as three. They are in the adapter's file: singular vectors may
    have another sign, or turn among equal singular values, on another machine.
    """

    def measure(self, weight):
        rank, matrix = self.shape.rank, self._finite(weight).reshape(self.shape.rows, -1)
        U, S, Vh = torch.linalg.svd(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), full_matrices=False)
        U, S, Vh = U[:, :rank], S[:rank] / abs(self.scaling), Vh[:rank]
        U = U if self.scaling > 0 else -U
        if self.shape.factors == 2:
            zero = S / S[0].clamp_min(torch.finfo(S.dtype).tiny) <= max(matrix.shape) * torch.finfo(S.dtype).eps
            root = S.sqrt().masked_fill(zero, 0)
            # where the weight is of lower rank, B_0 is not zero, or nothing there would train
            factors = U * root.masked_fill(zero, root[0] or 1), root[:, None] * Vh
        else:
            factors = U, S.diag(), Vh
        self.state = {
            suffix: factor.float().contiguous() for suffix, factor in zip(self.shape.parts, factors, strict=True)
        }

    def state_shapes(self):
        return self.shape.parts

    def draw(self, device):
        return tuple(self.state[suffix].to(device) for suffix in self.shape.parts)


STARTS: dict[str, type[Start]] = {"svd": TruncatedSVD, "orthogonal": Orthogonal, "random": Random}
"""Of replaced weights, by name: the only list."""
