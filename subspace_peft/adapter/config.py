"""SubspaceConfig: what is trained, in which subspace, and all checks that need no model."""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from numbers import Integral, Real

from peft import PeftConfig
from peft.utils import PeftType

from ..coordinates import COORDINATES
from ..coordinates.starts import STARTS
from ..projections import PROJECTIONS
from .card import add_note
from .given_projection import GIVEN, stored_apart
from .renaming import Substitutions, are_names, check_names


NORMALIZATIONS = ("rows", "columns")
OF_ONE_DIMENSION = "vectors"
"""What `parameters` is for those of one dimension."""
PROJECTION_VERSION = 1
CHOICES: dict[str, Sequence[object]] = {
    "projection": tuple(PROJECTIONS),
    "coordinates": tuple(COORDINATES),
    "normalization": NORMALIZATIONS,
    "replace_weight": (True, False),
    "start": (*STARTS, None),
    "factors": (2, 3),
    "init_weights": (True, False),
    "save_projection": (True, False, None),
}
"""Field -> the values it can have."""

BELONGS: tuple[tuple[str, object, str, Sequence[object]], ...] = (
    *((given, None, "projection", (projection,)) for projection, given in GIVEN.items()),
    ("nnz_per_row", None, "projection", ("sparse", "fastjl")),
    ("rank", None, "coordinates", ("low_rank",)),
    ("alpha", None, "coordinates", ("low_rank",)),
    ("replace_weight", False, "coordinates", ("low_rank",)),
    ("start", None, "coordinates", ("low_rank",)),
    ("factors", 2, "coordinates", ("low_rank",)),
    ("gamma", None, "coordinates", ("low_rank",)),
    ("start", None, "replace_weight", (True,)),
    ("gamma", None, "factors", (3,)),
)
"""A field, its value where it is left out, and the values of another field that it belongs to."""


def package_version() -> str:
    try:
        return version("subspace_peft")
    except PackageNotFoundError:
        return "unknown"


@dataclass
class SubspaceConfig(PeftConfig):
    """Train theta_d, one vector of d parameters, in place of the D entries theta of the target tensors.

        theta = origin + P theta_d

    The origin is the base model as it is when it is wrapped. P [D, d] is fixed. At theta_d = 0 the model equals its
    base, unless `replace_weight` is set. The row of an embedding's `padding_idx` stays, unless a given P moves it.

    Args:
        d (`int`): The dimension of the subspace, from 1 to D. Leave it out for `identity` (d = D), `coordinate` (d is
            the number of entries in the mask), or to use every column of a `basis`.
        projection (`str`): What P is. A random P is drawn from the seed for each tensor; H is a Hadamard matrix:

            - `dense`: independent standard normals (Li et al. 2018);
            - `sparse`: `nnz_per_row` random signs in each row (one of them is the map of Uni-LoRA, Li et al. 2025);
            - `fastfood`: blocks D H G Pi H B of signs D and B, a permutation Pi and normals G (Le et al. 2013);
            - `fastjl`: blocks D2 H D1 S of signs D2 and D1 and a scatter S, the transpose of the fast
              Johnson-Lindenstrauss transform (Ailon and Chazelle 2009);
            - `kronecker`: blocks made by `fastjl` between two Hadamard matrices, which act on a Linear's inputs and
              outputs, so that the increment is not formed (Jin, Kolda and Ward 2021);
            - `basis`: given orthonormal columns, as in DLDR (Li et al. 2021) and lottery subspaces (Larsen et al.
              2021);
            - `coordinate`: given entries of theta, as in lottery tickets (Frankle and Carbin 2019);
            - `identity`: P = I, which is full fine-tuning, or LoRA with `low_rank` (Hu et al. 2021).
        coordinates (`str`): What theta is. `weight`: the target tensors themselves. `low_rank`: the factors of an
            increment, W = W_0 + alpha / rank (B_0 + P_B theta_d)(A_0 + P_A theta_d) with B_0 = 0.
        rank (`int`): The rank of the factors; needed for `low_rank`.
        alpha (`float`): The product of the factors is multiplied by alpha / rank, for `low_rank`. Default: the rank.
        replace_weight (`bool`): With `low_rank`: whether the product replaces W_0 rather than being added to it. Each
            target then runs as two smaller modules, and the model starts at another one than its base.
        start (`str`): With `replace_weight`: where the factors start. `svd` (the default): at the best approximation
            of the weight. `orthogonal` or `random`: at such factors whose product has the norm of the weight.
        factors (`int`): With `low_rank`: 2 for B A, or 3 for U W V with W of rank x rank.
        gamma (`float`): With three factors: a step of theta_d moves U and V by gamma times as much as W. This is a
            learning rate of gamma times that of W under Adam, and gamma^2 times under SGD (Qu 2023). Default: 1.
        seed (`int`): The seed that a random P is drawn from.
        normalization (`str`): `rows`: the rows of P that move have mean square norm 1, so that a step of Adam moves a
            weight by about the learning rate, whatever d and D are. `columns`: each column of P has norm 1 over all
            of D, as in the papers.
        nnz_per_row (`int`): How many non-zeros each row of `sparse` has, or how many entries of theta_d `fastjl` adds
            at each position. Default: 1.
        target_modules: The names of the modules, a regular expression, "all-linear", or "all" for every module that
            owns parameters.
        parameters (`list[str]` or `str`): Which parameters of each target, such as `["weight"]`; "vectors" for those
            of one dimension: weights of norms, biases, and the like. Default: all that it owns.
        target_parameters (`list[str]`): Parameters by the last parts of their names, as in LoRA, such as
            `["experts.down_proj"]`; alone, or beside `target_modules` and whatever `parameters` says. With `low_rank`
            each matrix of a tensor [experts, ., .] has factors of its own.
        exclude_modules, layers_to_transform, layers_pattern, modules_to_save: As in every PEFT method.
        renamed (`dict[str, str]`): For a base model whose modules had other names when the adapter was made: regular
            expressions for the new names, and what stood in the place of a match. The first that matches a name is
            applied. P, `target_modules`, `exclude_modules`, `basis` and `mask` then go by the old names.
        basis: For `basis`: a tensor [D, k]; or a dictionary of tensors [n, k]; or a safetensors file, or a folder with
            one, that holds either; or the folder of a Trajectory, whose first d principal components are taken. The
            first d columns are used, in their own dtype, and saved with the adapter.
        mask: For `coordinate`: a boolean tensor [D], or the other forms of `basis` with booleans.
        save_projection (`bool`): True also saves a P that the seed could redraw. False leaves out a `basis` given by
            its path: the adapter then holds the path and a digest of the columns, and several adapters share the file.
        projection_version (`int`): The version of the rules by which P is drawn from the seed.
        cache_projection (`bool` or `int`): Whether drawn signs, indices and normals stay in memory: up to 1 GiB, or up
            to so many bytes, tensor by tensor in the order of the model. What is not held is drawn again at each use:
            the numbers are the same, and a step takes several times as long. False holds nothing.
        init_weights (`bool`): True starts theta_d at zero. False starts it at random, for tests.
        D (`int`), fingerprint, basis_digest, subspace_peft_version (`str`): Filled in when a model is wrapped: the
            number of entries, eight hexadecimal digits for the name, shape and padding of each target tensor, a
            digest of a basis that is not saved with the adapter, and the version that wrote the config.

    Wrapping fills these in, and d, the names that "all" stands for, and in `target_parameters` the experts that
    `target_modules` stands for, in a copy of its own, `model.peft_config`.

    Raises:
        ValueError: if a value is wrong for every model. A value that is wrong for one model raises ValueError when
            that model is wrapped, before anything in it changes.
    """

    d: int | None = None
    projection: str = "kronecker"
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
    parameters: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    renamed: dict[str, str] | None = None
    basis: object = field(default=None, repr=False, compare=False)
    mask: object = field(default=None, repr=False, compare=False)
    save_projection: bool | None = None
    projection_version: int = PROJECTION_VERSION
    cache_projection: bool | int = True
    init_weights: bool = True
    D: int | None = None
    fingerprint: str | None = None
    basis_digest: str | None = None
    subspace_peft_version: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.SUBSPACE_PEFT
        self.subspace_peft_version = self.subspace_peft_version or package_version()
        check_names("modules_to_save", self.modules_to_save, False)
        for name in ("target_modules", "exclude_modules"):
            check_names(name, getattr(self, name), True)
            if not isinstance(getattr(self, name), (str, type(None))):
                setattr(self, name, set(getattr(self, name)))
        for name in ("d", "nnz_per_row", "rank", "seed", "cache_projection"):
            setattr(self, name, _plain_integer(getattr(self, name)))
        self._check_choices()
        self._check_version()
        self._check_integers()
        if self.coordinates == "low_rank":
            self._check_low_rank()
        self._check_targets()
        Substitutions(self.renamed or {})
        # A fingerprint or digest that comes from a file is a demand on the model; one filled in later is not.
        self.expected_fingerprint, self.expected_basis_digest = self.fingerprint, self.basis_digest
        # What only the file of the adapter holds, for another adapter with its config: a given P, where factors start.
        self.given, self.starts = None, {}

    def _check_choices(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
                raise ValueError(f"`{name}` must be one of {', '.join(map(str, choices))}; got {value!r}.")
        for name, left_out, other, choices in BELONGS:
            value, actual = getattr(self, name), getattr(self, other)
            is_left_out = value is left_out or (left_out is not None and value == left_out)
            if not is_left_out and actual not in choices:
                condition = " or ".join(f"{other}={choice!r}" for choice in choices)
                shown = "" if name in GIVEN.values() else f"{name}={value!r} with "
                raise ValueError(
                    f"`{name}` belongs to {condition}, got {shown}{other}={actual!r}; set {condition} or leave "
                    f"`{name}` out."
                )

    def _check_version(self) -> None:
        if type(self.projection_version) is not int or self.projection_version < 1:
            raise ValueError(
                f"`projection_version` must be at least 1, got {self.projection_version!r}; leave it out."
            )
        if self.projection_version > PROJECTION_VERSION:
            raise ValueError(
                f"`projection_version` must be at most {PROJECTION_VERSION} for subspace_peft {package_version()}, "
                f"got {self.projection_version} (written by {self.subspace_peft_version}); upgrade subspace_peft."
            )

    def _check_integers(self) -> None:
        if self.d is None and self.projection not in ("identity", *GIVEN):
            raise ValueError(f"`d` is needed for projection={self.projection!r}: set it to 1 or more.")
        for name in ("d", "nnz_per_row", "rank"):
            value = getattr(self, name)
            if value is not None and (not _is_integer(value) or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if self.projection == "sparse" and self.nnz_per_row is not None and self.nnz_per_row > self.d:
            raise ValueError(
                f"`nnz_per_row` must be at most d = {self.d}, got {self.nnz_per_row}; lower it or raise `d`."
            )
        held = self.cache_projection
        if not isinstance(held, bool) and not (_is_integer(held) and held >= 0):
            raise ValueError(f"`cache_projection` must be True, False or a number of bytes, got {held!r}.")
        if not _is_integer(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"`seed` must be an integer from 0 to 2**63 - 1, got {self.seed!r}.")

    def _check_low_rank(self) -> None:
        """Check what only low_rank reads, and fill in its defaults."""
        if self.rank is None:
            raise ValueError("`rank` is needed for coordinates='low_rank': set it to 1 or more.")
        if self.alpha is not None and not _is_number(self.alpha):
            raise ValueError(f"`alpha` must be a number, got {self.alpha!r}; leave it out to use the rank.")
        self.alpha = float(self.rank) if self.alpha is None else float(self.alpha)
        if not isfinite(self.alpha) or self.alpha == 0:
            raise ValueError(f"`alpha` must be finite and not 0, got {self.alpha}; leave it out to use the rank.")
        if self.replace_weight:
            self.start = self.start or next(iter(STARTS))
        if self.gamma is None:
            return
        if not _is_number(self.gamma) or not isfinite(self.gamma) or self.gamma < 0:
            raise ValueError(
                f"`gamma` must be a finite number of at least 0, got {self.gamma!r}; 0 holds U and V still."
            )
        self.gamma = float(self.gamma)

    def _check_targets(self) -> None:
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` needs `target_modules` to be a list, got {self.target_modules!r}; name the modules."
                )
        if self.layers_pattern and not self.layers_to_transform and self.layers_to_transform != 0:
            raise ValueError(
                f"`layers_pattern` needs `layers_to_transform`, got `layers_pattern` = {self.layers_pattern!r} alone; "
                "set `layers_to_transform` too."
            )
        for name, shorthand in {"parameters": OF_ONE_DIMENSION, "target_parameters": None}.items():
            value = getattr(self, name)
            if value in (None, shorthand):
                continue
            if not are_names(value) or (shorthand and not value):
                rule = "a list of names" + (f" or {shorthand!r}" if shorthand else "")
                raise ValueError(f"`{name}` must be {rule}, got {value!r}; leave it out for all.")

    def to_dict(self) -> dict:
        """The content of adapter_config.json, without a basis or mask: it is saved with the weights, or is a path."""
        plain = copy.copy(self)
        plain.basis, plain.mask = os.fspath(self.basis) if stored_apart(self) else None, None
        content = super(SubspaceConfig, plain).to_dict()
        if content["renamed"] is None:
            del content["renamed"]  # versions that do not know it would warn
        return content

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """As in PEFT, with a note in the model card: import the package before loading the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        add_note(save_directory)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _plain_integer(value: object) -> object:
    """Convert NumPy integers to int, because JSON cannot store them; return anything else unchanged."""
    return operator.index(value) if isinstance(value, Integral) and not isinstance(value, bool) else value
