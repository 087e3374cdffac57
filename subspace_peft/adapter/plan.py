"""Plan: where one adapter goes in a model, checked before it goes there."""

from __future__ import annotations

from dataclasses import replace
from math import prod, sqrt

import torch
from accelerate.utils import align_module_device
from peft import PeftConfig
from torch import Tensor, nn

from ..coordinates import COORDINATES, Coordinates, LowRank
from ..coordinates.base import Shape, without_row
from ..coordinates.factored import operation
from ..coordinates.starts import STARTS, FactorShapes, Increment, Start, TruncatedSVD
from ..projections import PROJECTIONS, Projection, TensorRows
from ..slow_rate import watch
from .container import layer_around
from .fingerprint import check_fingerprint, fingerprint, in_order_of
from .given_projection import GIVEN, read_given
from .layer import SubspaceLayer
from .modules import device_of, padding_row
from .quantised import dequantised, is_quantised, operator, shape_of
from .renaming import UNCHANGED, Renaming
from .scale import normalising_scale
from .targets import Target
from .vectors import SubspaceVectors


CACHE_BYTES = 2**30
"""How much of P an adapter holds by default; what is beyond is drawn at each use, which takes several steps' time."""


def moved_shapes(config: PeftConfig, targets: list[Target]) -> dict[str, Shape]:
    """The shape of each target tensor that the config's coordinates move, in the order of theta.

    A row of padding moves only in a given P, which has rows for whole tensors, and in adapters of older versions.

    Raises:
        ValueError: if the modules that hold a tensor say that different rows are padding.
    """
    wholes = {name: shape_of(t.module, path) for t in targets for path, name in t.tensors.items()}
    expected, padding = config.expected_fingerprint, {} if config.projection in GIVEN else _padding(targets)
    readings = []
    for rows in (padding, {}):
        shapes = {name: Shape(whole, rows.get(name)) for name, whole in wholes.items()}
        shapes = {name: shape for name, shape in shapes.items() if prod(shape.moving) and _parts(config, shape)}
        if expected is None:
            return shapes
        readings.append(in_order_of(expected, shapes))
        if fingerprint(readings[-1]) == expected:
            return readings[-1]
    return readings[0]


def _padding(targets: list[Target]) -> dict[str, int]:
    """The row of each target tensor that is padding."""
    rows: dict[str, set[int]] = {}
    for target in targets:
        for path, name in target.tensors.items():
            if (row := padding_row(target.module, path)) is not None:
                rows.setdefault(name, set()).add(row)
    for name, several in rows.items():
        if len(several) > 1:
            raise ValueError(
                f"A target tensor must have one row of padding, `{name}` is tied and its modules have padding_idx "
                f"{sorted(several)}; set them to the same row, or leave the tensor out with `exclude_modules`."
            )
    return {name: min(one) for name, one in rows.items()}


def _parts(config: PeftConfig, shape: Shape, is_stacked: bool = False) -> dict[str, tuple[int, ...]]:
    """What P moves for a tensor of this shape: suffix -> shape."""
    return COORDINATES[config.coordinates].parts(shape.moving, config.rank, config.factors, is_stacked)


def _as_matrix(shape: tuple[int, ...], is_stacked: bool) -> tuple[int, int]:
    """The first dimension by the rest; the matrices of a stack below each other."""
    split = -1 if is_stacked else 1
    return prod(shape[:split]), prod(shape[split:])


class Plan:
    """The tensors that are theta, and the P that moves them.

    Raises:
        ValueError: if the config does not fit the targets.
    """

    def __init__(self, config: PeftConfig, targets: list[Target], renaming: Renaming = UNCHANGED):
        self.config, self.targets, self.renaming = config, targets, renaming
        self.shapes = moved_shapes(config, targets)  # the shape of each target tensor
        self.owners: dict[str, list[tuple[nn.Module, str]]] = {}  # the modules that hold it, and its path in each
        self.stacked = {target.tensors[path] for target in targets for path in target.stacked}
        for target in targets:
            for path, name in target.tensors.items():
                if name in self.shapes:
                    self.owners.setdefault(name, []).append((target.module, path))
        self.parts = {name: _parts(config, shape, name in self.stacked) for name, shape in self.shapes.items()}
        self._check_names()
        self._check_shapes()
        if config.replace_weight:
            self._check_replaced()
        if config.expected_fingerprint is not None:
            check_fingerprint(config.expected_fingerprint, self.shapes)
        projected = {name + suffix: part for name, parts in self.parts.items() for suffix, part in parts.items()}
        self.D = sum(map(prod, projected.values()))
        self.given = read_given(config, projected) or config.given
        self.d = self._dimension()
        self.starts = {name: self._start(name) for name in self.shapes} if config.coordinates == "low_rank" else {}

    # -------------------------------------------------------------------------------------------------------- checking

    def _check_names(self) -> None:
        for name, owners in self.owners.items():
            if len({id(getattr(module, path)) for module, path in owners}) > 1:
                raise ValueError(
                    f"`renamed` must give each target tensor a name of its own, but several are called `{name}`; "
                    "write its regular expressions narrower."
                )

    def _check_shapes(self) -> None:
        if not self.shapes:
            raise ValueError(
                f"coordinates={self.config.coordinates!r} need target tensors of two or more dimensions, found none; "
                "use coordinates='weight' or other `target_modules`."
            )
        if self.config.rank is None:
            return
        for name, shape in self.shapes.items():
            rows, *columns = shape.moving[1:] if name in self.stacked else shape.moving
            limit = min(rows, prod(columns))
            if self.config.rank > limit:
                raise ValueError(
                    f"`rank` must be at most the smaller dimension, {limit} for `{name}` of shape {shape}, got "
                    f"{self.config.rank}; lower `rank` or exclude that module."
                )

    def _check_replaced(self) -> None:
        for name, owners in self.owners.items():
            for module, path in owners:
                if path != "weight" or operation(operator(module)) is None:
                    groups = getattr(module, "groups", 1)
                    kind = f"{type(module).__name__}" + (f" of {groups} groups" if groups > 1 else "")
                    kind += " with scale_grad_by_freq" if getattr(module, "scale_grad_by_freq", False) else ""
                    raise ValueError(
                        "`replace_weight` must be given modules that run as two smaller ones (Linear, Conv1D, Conv1d "
                        f"to Conv3d without groups, Embedding), but `{name}` is of {kind}; leave that module out, or "
                        "add an increment with replace_weight=False."
                    )

    def _dimension(self) -> int:
        config, d = self.config, self.config.d
        if d is None:
            if self.given is None and config.projection != "identity":
                raise ValueError(f"`{GIVEN[config.projection]}` is needed for projection={config.projection!r}.")
            d = self.given.d if self.given else self.D
        if d > self.D:
            way_out = "lower `d` or widen `target_modules`"
            if config.D not in (None, self.D):
                way_out += (
                    ", or give each model a config of its own: wrapping filled in this one for a model of "
                    f"D = {config.D}"
                )
            raise ValueError(f"`d` must be at most the D = {self.D} adapted entries, got {d}; {way_out}.")
        if config.projection == "identity" and d != self.D:
            raise ValueError(f"projection='identity' has d = D = {self.D}, got d = {d}; leave `d` out.")
        if config.projection in GIVEN and self.given is None and config.expected_fingerprint is None:
            raise ValueError(f"`{GIVEN[config.projection]}` is needed for projection={config.projection!r}.")
        return d

    def _start(self, name: str) -> Start:
        config = self.config
        if name in config.starts:
            return config.starts[name]
        kind = STARTS[config.start] if config.replace_weight else Increment
        shapes = FactorShapes.of(self.shapes[name].moving, config.rank, config.factors, name in self.stacked)
        start = kind(name, shapes, config.alpha / config.rank, config.seed, config.projection_version)
        if config.expected_fingerprint is None or kind is not TruncatedSVD:  # the file of a saved adapter holds it
            module, path = self.owners[name][0]
            with align_module_device(module):
                weight = getattr(module, path)
                weight = dequantised(module) if is_quantised(weight) else weight
                start.measure(self._moving_rows(name, weight) if config.replace_weight else weight)
        return start

    def _moving_rows(self, name: str, weight: Tensor) -> Tensor:
        """The rows of a weight that move.

        Raises:
            ValueError: if the row of padding is not zero, since that of a product is.
        """
        row = self.shapes[name].padding
        if row is None:
            return weight
        if self.config.expected_fingerprint is None and weight[row].any():
            raise ValueError(
                f"A row of padding must be zero to be replaced, row {row} of `{name}` is not; set it to zero, leave "
                "that module out, or add an increment with replace_weight=False."
            )
        return without_row(weight, row)

    # ---------------------------------------------------------------------------------------------------- carrying out

    def apply(self, vectors: SubspaceVectors, adapter: str) -> None:
        """Put a layer around each target, or the adapter into the layer that is there."""
        config = self.config
        config.d, config.D, config.fingerprint = self.d, self.D, fingerprint(self.shapes)
        config.basis_digest = self.given.digest if self.given else config.basis_digest
        coordinates = self._coordinates()
        device = device_of(self.targets[0].module)
        theta_d = torch.zeros(self.d, device=device)
        if not config.init_weights:
            theta_d = torch.randn(self.d, device=device)
        # A given P comes with the file when an adapter is loaded, and its scale with it.
        is_known = config.projection not in GIVEN or self.given is not None
        scale = normalising_scale(config, coordinates) if is_known else None
        joint_cache = None
        if not config.save_projection or config.projection == "identity":
            # The file of a saved P holds the rows of each tensor: its readers get the same outputs only if no rows
            # are made together.
            projections = [projection for c in coordinates.values() for projection in c.projections.values()]
            joint_cache = PROJECTIONS[config.projection].together(projections)
        vectors.add(adapter, theta_d, scale, joint_cache, self.renaming)
        self._watch(vectors.subspace_peft_theta_d.get_submodule(adapter))
        layers: dict[int, SubspaceLayer] = {}
        for target in self.targets:
            layer = layers.get(id(target.module), target.layer)
            if not isinstance(layer, SubspaceLayer):
                layer = layer_around(target.module, vectors)
            target.parent._modules[target.child] = layer
            if id(target.module) not in layers:  # a module under several names stays one
                layers[id(target.module)] = layer
                moved = {path: coordinates[name] for path, name in target.tensors.items() if name in coordinates}
                layer.add_adapter(adapter, moved, target.merged_elsewhere)

    def _watch(self, holder: nn.ParameterDict) -> None:
        """Have a rate at which theta_d hardly moves warned of, where its scale is known."""
        if self.config.projection not in GIVEN and self.config.coordinates == "weight":
            inputs = sum(_as_matrix(shape.moving, name in self.stacked)[1] for name, shape in self.shapes.items())
            watch(holder, inputs, 1.0 if self.config.normalization == "rows" else sqrt(self.d / self.D))

    def _coordinates(self) -> dict[str, Coordinates]:
        config, coordinates = self.config, {}
        offset = column = held = 0
        limit = config.cache_projection
        limit = CACHE_BYTES * limit if isinstance(limit, bool) else limit
        for name, parts in self.parts.items():
            projections = {}
            for suffix, part in parts.items():
                given = self._given_rows(name + suffix, prod(part))
                rows = TensorRows(
                    name=name + suffix,
                    n=prod(part),
                    d=self.d,
                    seed=config.seed,
                    offset=offset,
                    column=column,
                    nnz_per_row=config.nnz_per_row,
                    version=config.projection_version,
                    cache=limit > 0,
                    shape=_as_matrix(part, name in self.stacked),
                    given=given,
                )
                projection = PROJECTIONS[config.projection](rows)
                if held + projection.state_bytes > limit:
                    projection = PROJECTIONS[config.projection](replace(rows, cache=False))
                projections[suffix] = projection
                held += projection.state_bytes if projection.rows.cache else 0
                offset += rows.n
                column += len(given) if config.projection == "coordinate" else 0
            coordinates[name] = self._coordinates_of(name, projections)
        return coordinates

    def _given_rows(self, name: str, n: int) -> Tensor | None:
        """The rows of a given P; an empty tensor in their place if they will come with the file."""
        if self.config.projection not in GIVEN:
            return None
        if self.given is not None:
            return self.given.rows[name]
        if self.config.projection == "basis":
            return torch.empty(n, self.d, device="meta")
        return torch.empty(0, dtype=torch.int64)

    def _coordinates_of(self, name: str, projections: dict[str, Projection]) -> Coordinates:
        config = self.config
        kind, shape = COORDINATES[config.coordinates], self.shapes[name]
        if kind is not LowRank:
            return kind(name, shape.whole, projections, shape.padding)
        gamma = 1.0 if config.gamma is None else config.gamma
        return LowRank(name, shape.whole, projections, self.starts[name], gamma, shape.padding)
