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
BLOCKS = ("top", "middle", "bottom")


def blocks(q: int, rank: int) -> dict[str, slice]:
    """Singular vectors 0 ... q - 1, by falling singular value: the first `rank`, the last `rank`, and those between.

    Of a small matrix the first come first: the middle is empty from q = 2 rank down, the bottom from q = rank down.
    """
    top, bottom = min(rank, q), max(q - rank, min(rank, q))
    return {"top": slice(0, top), "middle": slice(top, bottom), "bottom": slice(bottom, q)}


class Spectra:
    """W(t) = U(t) diag(sigma(t)) V(t)^T of weights at steps t, and the angles of U and V against a reference step.

    By block of `rank` singular vectors (see `blocks`) all principal angles between its span at t and at the reference;
    and by number i the angle of u_i(t) and u_i, v_i(t) and v_i. Gradient descent of deep linear networks on targets of
    rank r keeps the d - 2r middle ones where they are (Yaras et al. 2023; Qu's slides).

    Blocks, and single vectors even more, mean something only where their singular values differ from all others. From
    an orthogonal start, all equal, the SVD of step 0 is arbitrary: take the first step after it as the reference.

    Args:
        rank: Of the top and of the bottom block; the number of classes, say.
        names: Which weights, as in `matrices`.
        folder: Where each step is kept as `<step>.safetensors`, and what is there is gone on with; in memory alone if
            left out.
        reference: A step; the first that is recorded if left out. Angles of earlier steps are NaN.
        dtype: Of the decomposition; angles below 1e-7 are lost in float32.

    Raises:
        ValueError: if `rank` is not positive, or the folder holds something else.
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
        self._vectors: dict[str, Tensor] = {}  # of the reference step
        for path in self._files():
            self._read(path)

    # ------------------------------------------------------------------------------------------------------ recording

    def add(self, model: nn.Module | Mapping[str, Tensor], step: int | None = None) -> None:
        """Record one step: of a model, plain or in PEFT, or of tensors by name.

        Call it on every process: sharded parameters are gathered one at a time (by FSDP of version 1 all at once), and
        the main process decomposes. The last step may be recorded again; to go back further, call `keep_until`.

        Args:
            step: One more than the last if left out, from 0.

        Raises:
            ValueError: if the step is before the last, no weight is named, one has another shape than before, or is
                not finite.
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
            wide = matrix.cpu() if matrix.device.type == "mps" else matrix  # which has no float64
            U, sigma, Vh = torch.linalg.svd(wide.to(self.dtype), full_matrices=False)
            record[f"{name}/singular_values"] = sigma.cpu()
            for side, now in zip(SIDES, (U, Vh.mT), strict=True):
                key = f"{name}/{side}"
                if is_reference:
                    vectors[f"{key}/reference"] = now.cpu().contiguous()
                start = now if is_reference else self._vectors.get(f"{key}/reference")
                record |= self._angles(key, now, None if start is None else start.to(now.device))
        self._check_model(record, step)
        if is_reference:
            self._vectors = vectors
        if self.folder:
            self._write(step, record | vectors, {"rank": str(self.rank), "reference": str(reference)})
        self._records[step] = record

    def _angles(self, key: str, now: Tensor, start: Tensor | None) -> dict[str, Tensor]:
        """[q] each: principal angles of one block after the other, and those of single vectors."""
        if start is None:
            principal, vectors = (now.new_full((now.shape[1],), torch.nan) for _ in range(2))
        elif start.shape != now.shape:
            raise ValueError(_other_model(key.rpartition("/")[0], now.shape, start.shape))
        else:
            parts = blocks(now.shape[1], self.rank).values()
            principal = torch.cat([principal_angles(now[:, part], start[:, part]) for part in parts])
            vectors = vector_angles(now, start)
        return {f"{key}/angles": principal.cpu(), f"{key}/vector_angles": vectors.cpu()}

    def _check_model(self, record: dict[str, Tensor], step: int) -> None:
        first = next((other for at, other in self._records.items() if at != step), record)
        for key in [*first, *record]:
            here, there = (each[key].shape if key in each else None for each in (record, first))
            if here != there:
                raise ValueError(_other_model(key.partition("/")[0], here, there))

    def keep_until(self, step: int) -> None:
        """Forget later steps, their files too: to go on from a checkpoint of this step."""
        for later in [other for other in self.steps if other > step]:
            if self.folder and is_main_process():
                self._path(later).unlink(missing_ok=True)
            del self._records[later]
        if not self._records or (self.reference or 0) > step:
            self._vectors = {}

    # ------------------------------------------------------------------------------------------------------ its files

    def _files(self) -> list[Path]:
        found = self.folder.glob("*.safetensors") if self.folder else ()
        return sorted((path for path in found if re.fullmatch(r"\d{8,}", path.stem)), key=lambda path: int(path.stem))

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
                    f"{given}; take that, or another folder."
                )
        self.reference = int(settings["reference"])
        vectors = {key: tensor for key, tensor in tensors.items() if key.endswith("/reference")}
        self._vectors |= vectors
        self._records[int(path.stem)] = {key: tensor for key, tensor in tensors.items() if key not in vectors}

    # ----------------------------------------------------------------------------------------------------- what it saw

    @property
    def steps(self) -> list[int]:
        """Ascending."""
        return list(self._records)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def weights(self) -> list[str]:
        """The names of what is watched."""
        record = next(iter(self._records.values()), {})
        return [key.removesuffix("/singular_values") for key in record if key.endswith("/singular_values")]

    def singular_values(self, name: str) -> Tensor:
        """sigma_i(t), descending: [t, q]."""
        return self._stacked(name, "singular_values")

    def angles(self, name: str, side: str, block: str) -> Tensor:
        """The principal angles of a block against the reference, in radians, ascending: [t, p]."""
        _check_name("block", block, BLOCKS)
        _check_name("side", side, SIDES)
        stacked = self._stacked(name, f"{side}/angles")
        return stacked[:, blocks(stacked.shape[1], self.rank)[block]]

    def vector_angles(self, name: str, side: str) -> Tensor:
        """The angles of single singular vectors against the reference, in radians: [t, q]."""
        _check_name("side", side, SIDES)
        return self._stacked(name, f"{side}/vector_angles")

    def _stacked(self, name: str, what: str) -> Tensor:
        if name not in self.weights:
            raise ValueError(f"A weight must be recorded to be looked at, {name!r} is none of {self.weights}.")
        return torch.stack([record[f"{name}/{what}"] for record in self._records.values()])


def _check_step(name: str, step: int) -> None:
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"`{name}` must be an integer of at least 0, got {step!r}.")


def _check_name(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise ValueError(f"`{what}` must be one of {', '.join(known)}, got {name!r}.")


def _other_model(name: str, here, there) -> str:
    return (
        f"All steps must be of one model: `{name}` gives {here and list(here)} here, {there and list(there)} before; "
        "watch each model in a Spectra of its own."
    )
