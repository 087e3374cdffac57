"""The adapter's file: which numbers are saved, and every check that a file can fail when it is loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from hashlib import blake2b

import torch
from peft import PeftConfig
from torch import Tensor, nn

from ..coordinates import Coordinates
from .given_projection import GIVEN, stored_apart
from .layer import STATISTICS, SubspaceLayer
from .plan import scale
from .walk import PREFIX, VECTORS, find_vectors, named_layers, plain, unique_coordinates


IDENTITY = ("fingerprint", "D", "d", "projection", "coordinates", "rank", "alpha", "seed", "normalization")
IDENTITY += ("nnz_per_row", "projection_version")
LATER = ("replace_weight", "start", "factors", "gamma")
"""Named where they differ from their defaults alone: files are marked that were written before there were any."""


def identity(config: PeftConfig) -> str:
    """All that P and its use depend on."""
    later = [field for field in LATER if getattr(config, field) != getattr(type(config), field)]
    return json.dumps({field: getattr(config, field) for field in (*IDENTITY, *later)})


def mark(config: PeftConfig) -> Tensor:
    """`identity` in 64 bits: int64 [1]."""
    digest = blake2b(identity(config).encode(), digest_size=8).digest()
    return torch.tensor([int.from_bytes(digest, "little", signed=True)])


def statistics(model: nn.Module, adapter: str) -> Iterator[tuple[list[str], Tensor]]:
    """The state-dict keys of each batch-norm statistic of an adapter, one a name of its module, and the base's own."""
    names: dict[SubspaceLayer, list[str]] = {}
    for name, layer in named_layers(model):
        names.setdefault(layer, []).append(name)
    for layer, its in names.items():
        for statistic in STATISTICS:
            if adapter in getattr(layer, PREFIX + statistic):
                yield [f"{name}.{PREFIX}{statistic}.{adapter}" for name in its], layer.base_statistic(statistic)


def select(model: nn.Module, config: PeftConfig, adapter: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is saved: theta_d, the statistics that training changed, a given P, and the mark of P itself."""
    vector = f"{VECTORS}.{PREFIX}theta_d.{adapter}"
    root = next(key.removesuffix(vector) for key in state_dict if key.endswith(vector)) + f"{VECTORS}.{PREFIX}"
    theta_d = f"{root}theta_d.{adapter}"
    kept = {theta_d: state_dict[theta_d], f"{root}identity.{adapter}": mark(config)}
    for (key, *_), base in statistics(model, adapter):
        if not torch.equal(state_dict[key].cpu(), base.cpu()):
            kept[plain(key)] = state_dict[key]
    with_P = (config.projection in GIVEN and not stored_apart(config)) or config.save_projection
    for coordinates in unique_coordinates(model, adapter).values():
        if with_P:
            for suffix, projection in coordinates.projections.items():
                given = projection.rows.given
                drawn = projection.state(torch.device("cpu")) if given is None else given
                for path, tensor in _flatten(drawn):
                    kept[f"{root}P.{coordinates.name}{suffix}/{path}.{adapter}"] = tensor
        for suffix, tensor in (coordinates.start.saved() if coordinates.start else {}).items():
            kept[f"{root}start.{coordinates.name}/{suffix}.{adapter}"] = tensor
    for key in [key for key in state_dict if key.rpartition(".")[0].endswith(".base_layer")]:
        # PEFT adds the base's embeddings to the file where a target is called lm_head or embed_tokens; it looks for
        # them in this dictionary, a copy of its own. They belong to the base.
        del state_dict[key]
    return kept


def remap(model: nn.Module, config: PeftConfig, adapter: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `select`; puts a saved P in its place.

    Raises:
        ValueError: if the file belongs to another P, or lacks what it should hold, or holds it in another shape, or
            holds what this model has no place for.
    """
    remapped: dict[str, Tensor] = {}
    places: dict[str, list[str]] = {}
    for keys, base in statistics(model, adapter):
        remapped |= dict.fromkeys(keys, base.detach().clone())
        places |= {plain(key): keys for key in keys}
    saved: dict[str, dict[str, Tensor]] = {}
    starts: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        _, vectors, rest = key.rpartition(f"{VECTORS}.{PREFIX}")
        if not vectors:
            bare = key.removeprefix("base_model.model.")
            names = [f"{plain(k)}.{adapter}" for k in (key, bare)]
            keys = next((places[name] for name in names if name in places), [key])
            if keys == [key] and f".{PREFIX}" in f".{key}":
                raise ValueError(
                    f"The adapter file must fit the model, which has no batch norm for `{key}`; load the base model "
                    "that the adapter was trained on."
                )
            remapped |= dict.fromkeys(keys, value)
        elif rest == "theta_d":
            _check_theta_d(value, config)
            remapped[f"{key}.{adapter}"] = value
        elif rest == "identity":
            _check_mark(value, config)
        elif rest.startswith("P."):
            name, _, path = rest.removeprefix("P.").rpartition("/")
            saved.setdefault(name, {})[path] = value
        elif rest.startswith("start."):
            name, _, path = rest.removeprefix("start.").rpartition("/")
            starts.setdefault(name, {})[path] = value
        else:
            raise ValueError(
                f"The adapter file holds `{key}`, which no version of subspace_peft writes; it is damaged."
            )
    if not any(key.endswith(f"{VECTORS}.{PREFIX}theta_d.{adapter}") for key in remapped):
        raise ValueError("The adapter file must hold theta_d, and does not; it is damaged.")
    coordinates = unique_coordinates(model, adapter)
    _install(coordinates, config, saved)
    if saved:
        find_vectors(model).scales[adapter] = scale(config, coordinates)
    _install_starts(coordinates, starts)
    return remapped


def _check_theta_d(found: Tensor, config: PeftConfig) -> None:
    if found.shape != (config.d,) or not found.is_floating_point():
        raise ValueError(
            f"theta_d in the adapter file must be {config.d} floating numbers as adapter_config.json says, got "
            f"{found.dtype} of shape {list(found.shape)}; the two files do not belong together."
        )


def _check_mark(found: Tensor, config: PeftConfig) -> None:
    if not torch.equal(found.cpu(), mark(config)):
        raise ValueError(
            f"The adapter file must belong to the adapter it is loaded into, {identity(config)}: its theta_d was "
            "trained with another seed, d, projection or base; load it under another adapter name, with its own "
            "adapter_config.json."
        )


def _flatten(tensors, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Nested tuples of tensors, each under its indices: "0.2"; a lone tensor under ""."""
    if isinstance(tensors, Tensor):
        yield path.removeprefix("."), tensors
    else:
        for i, tensor in enumerate(tensors):
            yield from _flatten(tensor, f"{path}.{i}")


def _unflatten(tensors: dict[str, Tensor]) -> Tensor | tuple:
    if "" in tensors:
        return tensors[""].clone()  # a file's tensors are not aligned in memory, on which a product's rounding depends
    inner: dict[int, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        first, _, rest = path.partition(".")
        inner.setdefault(int(first), {})[rest] = tensor
    return tuple(_unflatten(inner[i]) for i in sorted(inner))


def _install(coordinates: dict[str, Coordinates], config: PeftConfig, saved: dict[str, dict[str, Tensor]]) -> None:
    """Put a P that came with the file in place of the one that is missing or would be redrawn."""
    projections = {c.name + suffix: (c, suffix) for c in coordinates.values() for suffix in c.projections}
    if config.projection in GIVEN and set(saved) != set(projections) and (saved or not stored_apart(config)):
        raise ValueError(
            f"The adapter file must hold the {GIVEN[config.projection]} it was trained in; it is damaged."
        )
    if unknown := sorted(set(saved) - set(projections)):
        raise ValueError(
            f"The adapter file must fit the model, which has no target tensor `{unknown[0]}` for the rows of P in it; "
            "load the base model that the adapter was trained on."
        )
    column = 0
    for name, tensors in ((name, saved[name]) for name in projections if name in saved):
        owner, suffix = projections[name]
        given = _unflatten(tensors)
        block = dataclasses.replace(owner.projections[suffix].rows, given=given, column=column)
        owner.projections[suffix] = type(owner.projections[suffix])(block)
        column += len(given) if config.projection == "coordinate" else 0


def _install_starts(coordinates: dict[str, Coordinates], saved: dict[str, dict[str, Tensor]]) -> None:
    """Start the factors where those of the file started, whatever the base's weights say."""
    starts = {name: c.start for name, c in coordinates.items() if c.start and c.start.state_shapes()}
    if set(saved) != set(starts):
        name = min(set(saved) ^ set(starts))
        raise ValueError(
            f"The adapter file must hold where the factors of each replaced weight start, for `{name}` it "
            f"{'has no place' if name in saved else 'does not'}; it is damaged, or of another base model."
        )
    for name, tensors in saved.items():
        wanted, found = starts[name].state_shapes(), {path: tuple(tensor.shape) for path, tensor in tensors.items()}
        if found != wanted:
            raise ValueError(
                f"The start of `{name}` in the adapter file must be {wanted}, got {found}; it is damaged."
            )
        starts[name].load({path: tensor.clone() for path, tensor in tensors.items()})
