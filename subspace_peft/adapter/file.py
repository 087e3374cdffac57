"""The adapter's file: which tensors are saved, and every check that a file can fail when it is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from peft import PeftConfig
from torch import Tensor, nn

from ..coordinates import Coordinates
from ..projections import Projection
from . import statistics
from .embeddings import keys_in_model, offer
from .fingerprint import check_mark, mark
from .given_projection import GIVEN, Given, stored_apart
from .layer import SubspaceLayer
from .renaming import Renaming
from .scale import normalising_scale
from .vectors import PREFIX, VECTORS
from .walk import find_vectors, named_layers, plain, unique_coordinates


Tensors = dict[str, Tensor]
ROOT = "base_model.model."
"""Begins the keys of a PeftModel; a model with an injected adapter has none."""


def select(model: nn.Module, config: PeftConfig, adapter: str, state_dict: Tensors) -> Tensors:
    """The part of the model's state dict that is saved, and what is saved beside it.

    That is theta_d, batch-norm statistics, a given P, the start of replaced weights, and the mark of P. Training adds
    no key, and all but an integer P are floats: federated learning averages them entry by entry.

    Where FSDP of version 1 gathers tensors, only the main process has any; the others select none. PEFT has left out
    the statistics in whose keys the name of another adapter stands between two dots, as "0" may: the model has them.
    """
    if not state_dict:
        return {}
    vectors, suffix = find_vectors(model), f"theta_d.{adapter}.vector"
    root = next(key.removesuffix(suffix) for key in state_dict if key.endswith(f"{VECTORS}.{PREFIX}{suffix}"))
    kept = {f"{root}theta_d.{adapter}": state_dict[root + suffix], f"{root}identity.{adapter}": mark(config)}
    renaming = vectors.renamings[adapter]
    for (key, *_), of_adapter, _ in _statistics(model, adapter):
        statistic = state_dict.get(key, of_adapter)
        kept[_renamed(plain(key), renaming)] = statistic if statistic.is_floating_point() else statistic.float()
    saves_P = (config.projection in GIVEN and not stored_apart(config)) or config.save_projection
    for coordinates in unique_coordinates(model, adapter).values():
        if saves_P:
            for suffix, projection in coordinates.projections.items():
                for path, tensor in _flatten(_content(projection)):
                    kept[f"{root}P.{coordinates.name}{suffix}/{path}.{adapter}"] = tensor
        for suffix, tensor in (coordinates.start.saved() if coordinates.start else {}).items():
            kept[f"{root}start.{coordinates.name}/{suffix}.{adapter}"] = tensor
    offer(model, config, state_dict)
    return kept


def remap(model: nn.Module, config: PeftConfig, adapter: str, state_dict: Tensors) -> Tensors:
    """The state dict of the model for that of a file, the reverse of `select`; puts a saved P in its place.

    Raises:
        ValueError: if the file belongs to another P, or lacks a tensor, or holds one in another shape, or one that
            this model has no place for; or if the adapter is merged.
    """
    if any(adapter in layer.merged_adapters for _, layer in named_layers(model)):
        raise ValueError(f"An adapter must be unmerged to be loaded, {adapter!r} is merged; call unmerge_adapter().")
    remapped: Tensors = {}
    places: dict[str, list[str]] = {}  # key in a file -> keys in this model
    renaming = find_vectors(model).renamings[adapter]
    for keys, _, base in _statistics(model, adapter):
        remapped |= dict.fromkeys(keys, base.detach().clone())
        places |= {name: keys for key in keys for name in (plain(key), _renamed(plain(key), renaming))}
    own = {n: key for name, key in keys_in_model(model).items() for n in (name, _renamed(name, renaming))}
    saved: dict[str, Tensors] = {}  # name of a projected tensor -> its part of P
    starts: dict[str, Tensors] = {}  # name of a target tensor -> the start of its factors
    for key, value in state_dict.items():
        _, vectors, rest = key.rpartition(f"{VECTORS}.{PREFIX}")
        kind, _, name = rest.partition(".")
        if not vectors:
            keys = _places_of(key, adapter, places) or [own.get(plain(key), key)]
            remapped |= dict.fromkeys(keys, _like(remapped.get(keys[0]), value))
        elif rest == "theta_d":
            _check_theta_d(value, config)
            root = ROOT if key.startswith(ROOT) else ""
            remapped[f"{root}{VECTORS}.{PREFIX}theta_d.{adapter}.vector"] = value
        elif rest == "identity":
            check_mark(value, config)
        elif kind in ("P", "start") and name:
            name, _, path = name.rpartition("/")
            (saved if kind == "P" else starts).setdefault(name, {})[path] = value
        else:
            raise ValueError(
                f"The adapter file holds `{key}`, which no version of subspace_peft writes; it is damaged."
            )
    if not any(key.endswith(f"{VECTORS}.{PREFIX}theta_d.{adapter}.vector") for key in remapped):
        raise ValueError("The adapter file must hold theta_d, but does not; it is damaged, or of another method.")
    coordinates = unique_coordinates(model, adapter)
    _install(coordinates, config, saved)
    if saved:
        find_vectors(model).scales[adapter] = normalising_scale(config, coordinates)
    _install_starts(coordinates, config, starts)
    return remapped


def _renamed(key: str, renaming: Renaming) -> str:
    """The key with the names that P is drawn from."""
    root = ROOT if key.startswith(ROOT) else ""
    return root + renaming(key.removeprefix(root))


def _statistics(model: nn.Module, adapter: str) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """The state-dict keys of each batch-norm statistic of the adapter, its value and the base's."""
    names: dict[SubspaceLayer, list[str]] = {}
    for name, layer in named_layers(model):
        names.setdefault(layer, []).append(name)
    for layer, layer_names in names.items():
        yield from statistics.keyed(layer, layer_names, adapter)


def _places_of(key: str, adapter: str, places: dict[str, list[str]]) -> list[str]:
    """The keys in the model for a statistic of the file; none for a tensor of the base."""
    names = [f"{plain(name)}.{adapter}" for name in (key, key.removeprefix(ROOT))]
    keys = next((places[name] for name in names if name in places), [])
    if not keys and f".{PREFIX}" in f".{key}":
        raise ValueError(
            f"The adapter file must fit the model, which has no batch norm for `{key}`; load the base model that the "
            "adapter was trained on."
        )
    return keys


def _check_theta_d(theta_d: Tensor, config: PeftConfig) -> None:
    if theta_d.shape != (config.d,) or not theta_d.is_floating_point():
        raise ValueError(
            f"theta_d in the adapter file must be {config.d} floating numbers as adapter_config.json says, got "
            f"{theta_d.dtype} of shape {list(theta_d.shape)}; the two files do not belong together."
        )


def _like(integers: Tensor | None, value: Tensor) -> Tensor:
    """The value, as the integers that it was before it was averaged where `integers` holds as many."""
    if integers is None or integers.is_floating_point() or not value.is_floating_point():
        return value
    if value.shape != integers.shape:  # FastJL's signs were numbers in version 0.1, and are bits now
        return value
    return value.round().to(integers.dtype)


def _unchanged(name: str, held: Tensor | None, value: Tensor) -> Tensor:
    """A part of P: as it is held, if the value is the average of equal ones.

    Raises:
        ValueError: if it is an average of others.
    """
    whole = _like(held, value)
    if whole is value:
        return value
    held, value = held.to("cpu", torch.float64), value.detach().cpu()
    if ((value.double() - held).abs() > 0.5 + 8 * torch.finfo(value.dtype).eps * held.abs()).any():
        raise ValueError(
            f"Adapters must share one P to be averaged, but the positions or signs of `{name}` in this average are "
            "not those of the adapter that it is loaded into; give every client the same mask or basis."
        )
    return held.to(whole)


def _content(projection: Projection) -> Tensor | tuple:
    """What a file holds of P."""
    given = projection.rows.given
    return projection.state(torch.device("cpu")) if given is None else given


def _flatten(tensors: Tensor | tuple, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Each tensor of nested tuples with its indices as a path, such as "0.2"; the path of a lone tensor is ""."""
    if isinstance(tensors, Tensor):
        yield path.removeprefix("."), tensors
    else:
        for i, tensor in enumerate(tensors):
            yield from _flatten(tensor, f"{path}.{i}")


def _unflatten(tensors: Tensors) -> Tensor | tuple:
    if "" in tensors:
        return tensors[""].clone()  # a file's tensors are not aligned in memory, on which a product's rounding depends
    inner: dict[int, Tensors] = {}
    for path, tensor in tensors.items():
        first, _, rest = path.partition(".")
        inner.setdefault(int(first), {})[rest] = tensor
    return tuple(_unflatten(inner[i]) for i in sorted(inner))


def _install(coordinates: dict[str, Coordinates], config: PeftConfig, saved: dict[str, Tensors]) -> None:
    """Use the P of the file, instead of one that is missing or drawn from the seed."""
    projections = {c.name + suffix: (c, suffix) for c in coordinates.values() for suffix in c.projections}
    if config.projection in GIVEN and set(saved) != set(projections) and (saved or not stored_apart(config)):
        raise ValueError(
            f"The adapter file must hold the {GIVEN[config.projection]} that it was trained in; it is damaged."
        )
    if unknown := sorted(set(saved) - set(projections)):
        raise ValueError(
            f"The adapter file must fit the model, which has no target tensor `{unknown[0]}` for the rows of P in it; "
            "load the base model that the adapter was trained on."
        )
    column = 0
    for name, tensors in ((name, saved[name]) for name in projections if name in saved):
        owner, suffix = projections[name]
        held = dict(_flatten(_content(owner.projections[suffix])))
        given = _unflatten({path: _unchanged(name, held.get(path), tensor) for path, tensor in tensors.items()})
        rows = dataclasses.replace(owner.projections[suffix].rows, given=given, column=column)
        owner.projections[suffix] = type(owner.projections[suffix])(rows)
        column += len(given) if config.projection == "coordinate" else 0
    if saved and config.projection in GIVEN:
        rows = {name: owner.projections[suffix].rows.given for name, (owner, suffix) in projections.items()}
        config.given = Given(config.d, rows)


def _install_starts(coordinates: dict[str, Coordinates], config: PeftConfig, saved: dict[str, Tensors]) -> None:
    """Start the factors where those of the file started, whatever the base's weights are."""
    starts = {name: c.start for name, c in coordinates.items() if c.start and c.start.measured_shapes()}
    if set(saved) != set(starts):
        name = min(set(saved) ^ set(starts))
        raise ValueError(
            "The adapter file must hold the start of the factors of each replaced weight and no other, but "
            f"{'holds' if name in saved else 'lacks'} that of `{name}`; it is damaged, or of another base model."
        )
    for name, tensors in saved.items():
        expected, shapes = starts[name].measured_shapes(), {path: tuple(t.shape) for path, t in tensors.items()}
        if shapes != expected:
            raise ValueError(
                f"The start of `{name}` in the adapter file must be {expected}, got {shapes}; it is damaged."
            )
        # another object: a graph of torch.compile holds the factors of the one that it has recorded
        starts[name] = coordinates[name].start = starts[name].loaded(
            {p: tensor.clone() for p, tensor in tensors.items()}
        )
    config.starts = starts
