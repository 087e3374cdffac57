"""Spectra: singular values of weights along a training, and how far their singular subspaces turn (Qu 2023)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..plain_model import gathered, is_main_process, wait_for_all
from .angles import principal_angles, vector_angles
from .matrices import Names, matrices


SIDES = ("left", "right")
BANDS = ("top", "middle", "bottom")


def bands(q: int, rank: int) -> dict[str, slice]:
    """The bands of q singular vectors in descending order: the first `rank`, the last `rank`, and those between.

    In a small matrix the top band is filled first: the middle is empty if q <= 2 rank, the bottom if q <= rank.
    """
    top, bottom = min(rank, q), max(q - rank, min(rank, q))
    return {"top": slice(0, top), "middle": slice(top, bottom), "bottom": slice(bottom, q)}


class Spectra:
    """W(t) = U(t) diag(sigma(t)) V(t)^T of weights at steps t, and the angles of U and V against a reference step.

    For each band of singular vectors (see `bands`) it records all principal angles between the span at t and at the
    reference, and for each i the angles between u_i(t) and u_i and between v_i(t) and v_i. In deep linear networks
    whose targets have rank r, gradient descent does not turn the d - 2r middle vectors (Yaras et al. 2023; Qu's
    slides).

    A band, and even more a single vector, is defined only if its singular values differ from all others. At an
    orthogonal start all are equal and the SVD of step 0 is arbitrary: use the first step after it as the reference.

    Args:
        rank: The size of the top and of the bottom band; for example the number of classes.
        names: The weights, as in `matrices`.
        folder: Where each step is stored as `<step>.safetensors`; steps that are there already are read. Without a
            folder they are in memory only.
        reference: A step; the first that is recorded if left out. Angles of earlier steps are NaN.
        dtype: The dtype of the decomposition; float32 loses angles below 1e-7.

    Raises:
        ValueError: if `rank` is not positive, or the folder holds records of other settings.
    """

    def __init__(
        self,
        rank: int,
        names: Names = None,
        folder: str | os.PathLike | None = None,
        reference: int | None = None,
        dtype: torch.dtype = torch.float64,
    ):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"`rank` must be an integer of at least 1, got {rank!r}.")
        if reference is not None:
            _check_step("reference", reference)
        self.rank, self.reference, self.dtype = rank, reference, dtype
        self.names = names if names is None or isinstance(names, str) else list(names)
        self.folder = None if folder is None else Path(folder)
        self._records: dict[int, dict[str, Tensor]] = {}
        self._vectors: dict[str, Tensor] = {}  # the singular vectors of the reference step
        for path in self._files():
            self._read(path)

    # ------------------------------------------------------------------------------------------------------ recording

    def add(self, model: nn.Module | Mapping[str, Tensor], step: int | None = None) -> None:
        """Record one step: of a model, plain or in PEFT, or of tensors by name.

        Call it on every process: sharded parameters are gathered one at a time (by FSDP of version 1 all at once), and
        the main process decomposes them. The last step may be recorded again; to go back further, call `keep_until`.

        Args:
            step: One more than the last step if left out, from 0.

        Raises:
            ValueError: if the step is before the last one, if there is no weight of these names, or if a weight has
                another shape than before or is not finite.
        """
        with gathered(model) if isinstance(model, nn.Module) else nullcontext():
            chosen = matrices(model, self.names)
            if is_main_process():
                self._record(chosen, self._next(step))
            else:
                for _ in chosen:
                    pass
        wait_for_all()

    def _next(self, step: int | None) -> int:
        last = self.steps[-1] if self._records else -1
        step = last + 1 if step is None else step
        _check_step("step", step)
        if step < last:
            raise ValueError(f"Steps must rise, got {step} after {last}; call keep_until({step}) to go back there.")
        if self.reference is not None and step > self.reference and not self._vectors:
            raise ValueError(
                f"The reference must be recorded before later steps, got {step} and `reference` is {self.reference}; "
                "record that step too."
            )
        return step

    def _record(self, chosen: Iterator[tuple[str, Tensor]], step: int) -> None:
        reference = next(iter(self._records), step) if self.reference is None else self.reference
        is_reference = step == reference
        record, vectors = {}, {}
        for name, matrix in chosen:
            if not matrix.isfinite().all():
                raise ValueError(f"A weight must be finite to have singular values, `{name}` is not at step {step}.")
            wide = matrix.cpu() if matrix.device.type == "mps" else matrix  # mps has no float64
            U, sigma, Vh = torch.linalg.svd(wide.to(self.dtype), full_matrices=False)
            record[f"{name}/singular_values"] = sigma.cpu()
            for side, columns in zip(SIDES, (U, Vh.mT), strict=True):
                key = f"{name}/{side}"
                if is_reference:
                    vectors[f"{key}/reference"] = columns.cpu().contiguous()
                start = columns if is_reference else self._vectors.get(f"{key}/reference")
                record |= self._angles(key, columns, None if start is None else start.to(columns.device))
        self._check_model(record, step)
        if is_reference:
            self._vectors = vectors
        if self.folder:
            self._write(step, record | vectors, {"rank": str(self.rank), "reference": str(reference)})
        self._records[step] = record

    def _angles(self, key: str, columns: Tensor, start: Tensor | None) -> dict[str, Tensor]:
        """The principal angles, band by band, and the angles of single vectors, against the start: [q] each."""
        if start is None:
            principal, vectors = (columns.new_full((columns.shape[1],), torch.nan) for _ in range(2))
        elif start.shape != columns.shape:
            raise ValueError(_other_model(key.rpartition("/")[0], columns.shape, start.shape))
        else:
            slices = bands(columns.shape[1], self.rank).values()
            principal = torch.cat([principal_angles(columns[:, band], start[:, band]) for band in slices])
            vectors = vector_angles(columns, start)
        return {f"{key}/angles": principal.cpu(), f"{key}/vector_angles": vectors.cpu()}

    def _check_model(self, record: dict[str, Tensor], step: int) -> None:
        first = next((other for at, other in self._records.items() if at != step), record)
        for key in [*first, *record]:
            shape, before = (each[key].shape if key in each else None for each in (record, first))
            if shape != before:
                raise ValueError(_other_model(key.partition("/")[0], shape, before))

    def keep_until(self, step: int) -> None:
        """Delete later steps and their files, to go on from a checkpoint of this step."""
        for later in [other for other in self.steps if other > step]:
            if self.folder and is_main_process():
                self._path(later).unlink(missing_ok=True)
            del self._records[later]
        if not self._records or (self.reference or 0) > step:
            self._vectors = {}

    # ------------------------------------------------------------------------------------------------------ its files

    def _files(self) -> list[Path]:
        paths = self.folder.glob("*.safetensors") if self.folder else ()
        return sorted((path for path in paths if re.fullmatch(r"\d{8,}", path.stem)), key=lambda path: int(path.stem))

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}.safetensors"

    def _write(self, step: int, tensors: dict[str, Tensor], settings: dict[str, str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        draft = self._path(step).with_suffix(".tmp")
        save_file(tensors, draft, metadata=settings)
        os.replace(draft, self._path(step))

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                settings = {"rank": "none", "reference": "none"} | (file.metadata() or {})
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"A record must be a whole safetensors file, {str(path)!r} is damaged ({error}); delete it."
            ) from None
        for name, given in (("rank", self.rank), ("reference", self.reference)):
            if given is not None and settings[name] != str(given):
                raise ValueError(
                    f"All records in a folder must be of one `{name}`, {str(path)!r} is of {settings[name]}, got "
                    f"{given}; use that one, or another folder."
                )
        self.reference = int(settings["reference"])
        vectors = {key: tensor for key, tensor in tensors.items() if key.endswith("/reference")}
        self._vectors |= vectors
        self._records[int(path.stem)] = {key: tensor for key, tensor in tensors.items() if key not in vectors}

    # ----------------------------------------------------------------------------------------------------- its record

    @property
    def steps(self) -> list[int]:
        """The recorded steps, ascending."""
        return list(self._records)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def weights(self) -> list[str]:
        """The names of the recorded weights."""
        record = next(iter(self._records.values()), {})
        return [key.removesuffix("/singular_values") for key in record if key.endswith("/singular_values")]

    def singular_values(self, name: str) -> Tensor:
        """sigma_i(t), descending: [t, q]."""
        return self._stacked(name, "singular_values")

    def angles(self, name: str, side: str, band: str) -> Tensor:
        """The principal angles of a band against the reference, in radians, ascending: [t, p]."""
        _check_name("band", band, BANDS)
        _check_name("side", side, SIDES)
        stacked = self._stacked(name, f"{side}/angles")
        return stacked[:, bands(stacked.shape[1], self.rank)[band]]

    def vector_angles(self, name: str, side: str) -> Tensor:
        """The angles of single singular vectors against the reference, in radians: [t, q]."""
        _check_name("side", side, SIDES)
        return self._stacked(name, f"{side}/vector_angles")

    def _stacked(self, name: str, what: str) -> Tensor:
        if name not in self.weights:
            raise ValueError(f"`name` must be a recorded weight, {name!r} is none of {self.weights}.")
        return torch.stack([record[f"{name}/{what}"] for record in self._records.values()])


def _check_step(name: str, step: int) -> None:
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"`{name}` must be an integer of at least 0, got {step!r}.")


def _check_name(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"`{what}` must be one of {', '.join(known)}, got {name!r}.")


def _other_model(name: str, shape: torch.Size | None, before: torch.Size | None) -> str:
    got, expected = ("no matrix" if each is None else f"shape {list(each)}" for each in (shape, before))
    return (
        f"All steps must be of one model: `{name}` gives {got} in this step and {expected} in an earlier one; record "
        "each model in a Spectra of its own."
    )
