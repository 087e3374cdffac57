"""SubspaceConfig: what is trained, in which subspace, and all checks that need no model."""

from __future__ import annotations

import copy
import operator
import os
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from numbers import Integral, Real

from peft import PeftConfig
from peft.utils import PeftType

from ..coordinates import COORDINATES
from ..coordinates.starts import STARTS
from ..projections import PROJECTIONS
from .given_projection import GIVEN, stored_apart


NORMALIZATIONS = ("rows", "columns")
PROJECTION_VERSION = 1
CARD_NOTE = """
## How to load this adapter

This is a [subspace_peft](https://pypi.org/project/subspace-peft/) adapter: PEFT knows its type once the package has
been imported (`pip install subspace-peft`).

```python
import subspace_peft  # makes the adapter type SUBSPACE_PEFT known to PEFT
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path or Hub id of this adapter")
```
"""


def package_version() -> str:
    try:
        return version("subspace_peft")
    except PackageNotFoundError:
        return "unknown"


@dataclass
class SubspaceConfig(PeftConfig):
    """Train theta_d, d numbers, instead of the D entries theta of the target tensors.

        theta = origin + P theta_d

    Args:
        d (`int`): Dimension of the subspace, 1 <= d <= D. May be left out where it follows: `identity` (d = D),
            `basis` (its columns) and `coordinate` (the entries in the mask).
        projection (`str`): What P is: `dense`, `sparse`, `fastfood`, `fastjl` (random, redrawn from the seed), `basis`
            (given orthonormal columns), `coordinate` (given entries), `identity`.
        coordinates (`str`): What theta is: `weight`, the target tensors themselves, or `low_rank`, the factors of
            W_0 + alpha / rank (B_0 + P_B theta_d)(A_0 + P_A theta_d) with B_0 = 0.
        rank (`int`), alpha (`float`): Of `low_rank` only; alpha is the rank if left out.
        replace_weight (`bool`): Of `low_rank` only: the weight is the product itself, without W_0, and a layer runs
            as two smaller ones. The model starts elsewhere than its base.
        start (`str`): Of `replace_weight` only, where the factors start: `svd`, the best approximation of the weight
            (the default), or `orthogonal` or `random` factors of its Frobenius norm.
        factors (`int`): Of `low_rank` only: 2, or 3 for U W V with W of rank x rank.
        gamma (`float`): Of three factors only: a step of theta_d moves U and V by gamma times as much as W; 1 if left
            out. Under Adam that is a learning rate of gamma times W's, under SGD of gamma^2 times.
        seed (`int`): What a random P is drawn from.
        normalization (`str`): `rows`: the rows of P that move have mean square norm 1, so a step of Adam moves a
            weight by about the learning rate, whatever d and D. `columns`: unit columns over all of D, as in the
            papers.
        nnz_per_row (`int`): Non-zeros a row of `sparse`, scattered copies of `fastjl`; 1 if left out.
        target_modules: Names, a regular expression, "all-linear", or "all": every module that owns parameters.
        parameters (`list[str]`): Which parameters of a target, for example `["weight"]`; all it owns if left out.
        exclude_modules, layers_to_transform, layers_pattern, modules_to_save: As in every PEFT method.
        basis: For `basis`: a tensor [D, k], a dictionary of one [n, k] for each tensor, a safetensors file or folder
            that holds either, or the folder of a Trajectory, whose first d principal components are taken (`d` is
            needed then). The first d columns are used in their dtype, and saved with the adapter.
        mask: For `coordinate`: the same with booleans, [D] or one of each tensor's shape.
        save_projection (`bool`): True: also save what a seed could redraw. False: with `basis` a path, do not save the
            columns either but that path and a digest of them, checked at load: several adapters share the file.
        projection_version (`int`): The recipe by which P is drawn from the seed.
        cache_projection (`bool`): Hold drawn signs and normals in memory (at most 8 bytes an entry for `fastfood` and
            `fastjl`). Without it P is redrawn at every use: slower, and no memory.
        init_weights (`bool`): True: theta_d = 0, the model equals its base. False: random, for tests.
        D (`int`), fingerprint, basis_digest, subspace_peft_version (`str`): Filled in when a model is wrapped: the
            number of entries, eight hexadecimal digits for (name, shape) of each target tensor, a digest of a basis
            that is not saved with the adapter, and who wrote it.

    Wrapping a model writes what it found into the config (names for "all", d, D): each model wants a config of its
    own.

    Raises:
        ValueError: for every value that no model could make right.
    """

    d: int | None = None
    projection: str = "fastfood"
    coordinates: str = "weight"
    rank: int | None = None
    alpha: float | None = None
    replace_weight: bool = False
    start: str | None = None
    factors: int = 2
    gamma: float | None = None
    seed: int = 0
    normalization: str = "rows"
    nnz_per_row: int | None = None
    target_modules: list[str] | str | None = None
    parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    basis: object = field(default=None, repr=False, compare=False)
    mask: object = field(default=None, repr=False, compare=False)
    save_projection: bool | None = None
    projection_version: int = PROJECTION_VERSION
    cache_projection: bool = True
    init_weights: bool = True
    D: int | None = None
    fingerprint: str | None = None
    basis_digest: str | None = None
    subspace_peft_version: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.SUBSPACE_PEFT
        self.subspace_peft_version = self.subspace_peft_version or package_version()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        for name in ("d", "nnz_per_row", "rank", "seed"):
            setattr(self, name, _plain_integer(getattr(self, name)))
        self._check_choices()
        self._check_switches()
        self._check_numbers()
        self._check_targets()
        # What a file says of its base is a demand on the model; what wrapping fills in later is not.
        self.expected_fingerprint, self.expected_basis_digest = self.fingerprint, self.basis_digest

    def _check_choices(self):
        for name, allowed in (
            ("projection", PROJECTIONS),
            ("coordinates", COORDINATES),
            ("normalization", NORMALIZATIONS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}; got {value!r}.")
        if type(self.projection_version) is not int:
            raise ValueError(f"`projection_version` must be an integer, got {self.projection_version!r}.")
        if self.projection_version > PROJECTION_VERSION:
            raise ValueError(
                f"`projection_version` must be at most {PROJECTION_VERSION} for subspace_peft {package_version()}, "
                f"got {self.projection_version} (written by {self.subspace_peft_version}); upgrade subspace_peft."
            )
        if self.projection_version < 1:
            raise ValueError(f"`projection_version` must be at least 1, got {self.projection_version}.")
        for projection, name in GIVEN.items():
            if getattr(self, name) is not None and self.projection != projection:
                raise ValueError(
                    f"`{name}` belongs to projection={projection!r}, got projection={self.projection!r}; set "
                    f"projection={projection!r} or leave `{name}` out."
                )
        if self.nnz_per_row is not None and self.projection not in ("sparse", "fastjl"):
            raise ValueError(
                f"`nnz_per_row` belongs to projection='sparse' and 'fastjl', got {self.projection!r}; leave it out."
            )

    def _check_switches(self):
        for name, allowed in (
            ("init_weights", (True, False)),
            ("replace_weight", (True, False)),
            ("cache_projection", (True, False)),
            ("save_projection", (True, False, None)),
        ):
            value = getattr(self, name)
            if not any(value is choice for choice in allowed):
                raise ValueError(f"`{name}` must be {' or '.join(map(str, allowed))}, got {value!r}.")

    def _check_numbers(self):
        if self.d is None and self.projection not in ("identity", *GIVEN):
            raise ValueError(f"`d` is needed for projection={self.projection!r}: set it to 1 or more.")
        for name in ("d", "nnz_per_row", "rank"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if self.projection == "sparse" and self.nnz_per_row is not None and self.nnz_per_row > self.d:
            raise ValueError(
                f"`nnz_per_row` must be at most d = {self.d}, got {self.nnz_per_row}; lower it or raise `d`."
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` must be an integer from 0 to 2**63 - 1, got {self.seed!r}.")
        if self.coordinates == "low_rank":
            if self.rank is None:
                raise ValueError("`rank` is needed for coordinates='low_rank': set it to 1 or more.")
            if self.alpha is not None and not _is_number(self.alpha):
                raise ValueError(f"`alpha` must be a number, got {self.alpha!r}.")
            self.alpha = float(self.rank) if self.alpha is None else float(self.alpha)
            if not isfinite(self.alpha) or self.alpha == 0:
                raise ValueError(f"`alpha` must be finite and not 0, got {self.alpha}; leave it out for the rank.")
            self._check_factors()
        elif self.rank is not None or self.alpha is not None:
            raise ValueError(
                f"`rank` and `alpha` belong to coordinates='low_rank', got coordinates={self.coordinates!r} with rank="
                f"{self.rank} and alpha={self.alpha}; set coordinates='low_rank' or leave them out."
            )
        elif (self.replace_weight, self.start, self.factors, self.gamma) != (False, None, 2, None):
            raise ValueError(
                "`replace_weight`, `start`, `factors` and `gamma` belong to coordinates='low_rank', got coordinates="
                f"{self.coordinates!r}; set coordinates='low_rank' or leave them out."
            )

    def _check_factors(self):
        if self.start is not None and not self.replace_weight:
            raise ValueError(
                f"`start` belongs to replace_weight=True, got {self.start!r}: an increment starts at zero; set "
                "replace_weight=True or leave `start` out."
            )
        if self.replace_weight:
            self.start = self.start or next(iter(STARTS))
            if self.start not in STARTS:
                raise ValueError(f"`start` must be one of {', '.join(STARTS)}; got {self.start!r}.")
        if type(self.factors) is not int or self.factors not in (2, 3):
            raise ValueError(f"`factors` must be 2 (B A) or 3 (U W V), got {self.factors!r}.")
        if self.gamma is None:
            return
        if self.factors == 2:
            raise ValueError(f"`gamma` belongs to factors=3, got {self.gamma!r}; set factors=3 or leave it out.")
        if not _is_number(self.gamma) or not isfinite(self.gamma) or self.gamma < 0:
            raise ValueError(
                f"`gamma` must be a finite number of at least 0, got {self.gamma!r}; 0 holds U and V still."
            )
        self.gamma = float(self.gamma)

    def _check_targets(self):
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str; name the modules.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str; name the modules.")
        if self.layers_pattern and not self.layers_to_transform and self.layers_to_transform != 0:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        if isinstance(self.parameters, str):
            raise ValueError(f"`parameters` must be a list of names, got {self.parameters!r}; write it as a list.")

    def to_dict(self) -> dict:
        """What goes into adapter_config.json: a given basis or mask is saved with the weights, or is a path."""
        plain = copy.copy(self)
        plain.basis, plain.mask = os.fspath(self.basis) if stored_apart(self) else None, None
        return super(SubspaceConfig, plain).to_dict()

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """PEFT's, and a note in the model card that the package must be imported before the adapter is loaded."""
        super().save_pretrained(save_directory, **kwargs)
        card = os.path.join(save_directory, "README.md")
        if os.path.isfile(card):
            with open(card, encoding="utf-8") as file:
                text = file.read()
            if CARD_NOTE.strip() not in text:
                with open(card, "a", encoding="utf-8") as file:
                    file.write(CARD_NOTE)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _plain_integer(value: object) -> object:
    """numpy's integers, of which grids consist, as Python's, which a file takes; what is no integer as it is."""
    return operator.index(value) if isinstance(value, Integral) and not isinstance(value, bool) else value
