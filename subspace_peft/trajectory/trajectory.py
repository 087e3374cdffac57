"""Trajectory: weights sampled along a training, and the subspaces that they span (DLDR, Li et al. 2021)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..plain_model import gathered, is_main_process, saved_buffers, trained_parameters, wait_for_all, whole
from .components import Components
from .samples import DTYPES, Samples, read_header, write_tensors


class Trajectory:
    """Samples w_1 ... w_t of the weights [D], one safetensors file each in a folder, and the basis that they span.

        W = [w_1 - w_mean, ..., w_t - w_mean],    W^T W V = V Sigma^2,    P = W V Sigma^-1

    (Li et al. 2021, section 3.2), in float64 over chunks of rows: in float32 the columns of P would lose their
    orthogonality. A computation reads the samples twice, or three times where sigma_d is so small relative to the
    samples that float64 alone does not suffice.

    Args:
        folder: Where the samples are or will be, `<step>.safetensors`.
        increments: Take w_i - w_(i-1) instead of the points w_i.
        initial: Use the sample of step 0 too, if there is one.
        last: Use the samples up to this step only; all if left out.
        memory: Bytes that a computation may use in addition to its result.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        increments: bool = False,
        initial: bool = True,
        last: int | None = None,
        memory: int = 2 * 2**30,
    ):
        self.folder, self.increments, self.initial, self.last = Path(folder), increments, initial, last
        self.memory = memory
        self._cache: tuple[object, Components] | None = None  # components with their Gram matrix, and their key

    # ------------------------------------------------------------------------------------------------------ recording

    def add(self, model: nn.Module, step: int | None = None) -> Path | None:
        """Write one sample: every parameter of `model` that trains, under its name in the plain model.

        Beside them lie the buffers of the state dict, such as batch norm's statistics, which enter no basis.

        Call it on every process. Sharded parameters are gathered one at a time (by FSDP of version 1 all at once), the
        main process writes, and all wait for it. A sample of the same step is replaced.

        Args:
            step: One more than the step of the last sample if left out, from 0.

        Returns:
            The file, on the main process; None on the others.

        Raises:
            ValueError: if nothing trains, DeepSpeed's ZeRO-3 holds the parameters, or the folder holds samples of
                another model.
        """
        if step is not None and (not isinstance(step, int) or isinstance(step, bool) or step < 0):
            raise ValueError(f"`step` must be an integer of at least 0, got {step!r}.")
        with gathered(model):
            parameters, buffers = trained_parameters(model), saved_buffers(model)
            # wide dtypes first, so that all tensors in the file are aligned
            tensors = dict(sorted((parameters | buffers).items(), key=lambda item: -item[1].dtype.itemsize))
            chunks = (whole(tensor) for tensor in tensors.values())
            if is_main_process():
                path = self._path_of(parameters, step)
                kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
                write_tensors(path, kinds, chunks, buffers)
            else:
                path = None
                for _ in chunks:
                    pass
        wait_for_all()  # otherwise a process that computes a basis next could miss this sample
        return path

    def _path_of(self, parameters: dict[str, nn.Parameter], step: int | None) -> Path:
        last = max(self.files(), default=-1)
        path = self.folder / f"{last + 1 if step is None else step:08d}.safetensors"
        self._check_model(parameters, path)
        self.folder.mkdir(parents=True, exist_ok=True)
        return path

    def _check_model(self, parameters: dict[str, nn.Parameter], path: Path) -> None:
        others = [other for other in self.files().values() if other != path]
        if not others:
            return
        recorded = {name: entry.shape for name, entry in read_header(others[0]).items()}
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        for name in [*recorded, *shapes]:
            if recorded.get(name) != shapes.get(name):
                raise ValueError(
                    f"All samples must be of one model: `{name}` is of shape {shapes.get(name, 'none')} in this model "
                    f"and of shape {recorded.get(name, 'none')} in {str(others[0])!r}; record each model, and each "
                    "choice of what trains, in a folder of its own."
                )

    def files(self) -> dict[int, Path]:
        """All samples in the folder by step, ascending, whether they are used or not."""
        paths = (path for path in self.folder.glob("*.safetensors") if re.fullmatch(r"\d{8,}", path.stem))
        return dict(sorted((int(path.stem), path) for path in paths))

    @property
    def steps(self) -> list[int]:
        """The steps of the samples that are used, ascending."""
        last = float("inf") if self.last is None else self.last
        return [step for step in self.files() if (step or self.initial) and step <= last]

    def __len__(self) -> int:
        return len(self.steps)

    def sample(self, i: int) -> dict[str, Tensor]:
        """The i-th sample that is used; -1 is the last: `model.load_state_dict(sample, strict=False)` goes there.

        It holds the parameters that train, which are those of `shapes`, and the buffers as they were.
        """
        path = self.files()[self.steps[i]]
        read_header(path)  # its error names the damaged file
        return load_file(path)

    # ---------------------------------------------------------------------------------------------------- its subspace

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each recorded parameter."""
        return self._components(None).samples.shapes

    def basis(
        self, d: int, center: bool = True, dtype: torch.dtype = torch.float32, names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """P by tensor: [*shape, d]. Its columns over all these tensors are orthonormal, to 1e-5 in float32.

        Args:
            center: Subtract the mean of the columns of W; otherwise W holds the points themselves.
            names: The tensors that W consists of; all if left out.

        Raises:
            ValueError: if the samples do not span d dimensions, are not finite, damaged, or of several models.
        """
        components, A = self._columns(d, center, dtype, names)
        basis = {name: torch.empty(*shape, d, dtype=dtype) for name, shape in components.samples.shapes.items()}
        for first, rows in components.rows(A):
            for name, inside, among in components.samples.spans(first, len(rows)):
                basis[name].view(-1, d)[inside] = rows[among]
        return basis

    def save_basis(
        self,
        file: str | os.PathLike,
        d: int,
        center: bool = True,
        dtype: torch.dtype = torch.float32,
        names: Iterable[str] | None = None,
    ) -> None:
        """Write `basis` to a safetensors file, chunk by chunk: it is never in memory as a whole."""
        components, A = self._columns(d, center, dtype, names)
        kinds = {name: (dtype, (*shape, d)) for name, shape in components.samples.shapes.items()}
        write_tensors(Path(file), kinds, (rows.to(dtype) for _, rows in components.rows(A)))

    @property
    def explained_variance_ratio(self) -> Tensor:
        """sigma_j^2 / sum_i sigma_i^2 of the centred W, descending: float64 [t], or [t - 1] for increments."""
        squares = self._components(None).spectrum(True)[0]
        if not squares.any():
            raise ValueError(f"Samples must differ to have a variance, all {len(self)} are identical.")
        return squares / squares.sum()

    def singular_values(self, center: bool = True) -> Tensor:
        """sigma_j of W, descending, 0 for those below the rounding error: float64 [t], or [t - 1] for increments."""
        return self._components(None).spectrum(center)[0].sqrt()

    def _columns(self, d: int, center: bool, dtype: torch.dtype, names) -> tuple[Components, Tensor]:
        if dtype not in DTYPES.values():
            raise ValueError(f"`dtype` must be one of {', '.join(map(str, DTYPES.values()))}, got {dtype}.")
        if not isinstance(d, int) or isinstance(d, bool) or d < 1:
            raise ValueError(f"`d` must be an integer of at least 1, got {d!r}.")
        components = self._components(names)
        return components, components.columns(d, center)

    def _components(self, names: Iterable[str] | None) -> Components:
        files = self.files()
        paths = [files[step] for step in self.steps]
        if not paths:
            raise ValueError(
                f"A trajectory must hold samples, {str(self.folder)!r} holds none; record some with "
                "Trajectory(folder).add(model) or TrajectoryCallback(folder)."
            )
        names = None if names is None else list(names)
        if names == []:
            raise ValueError("`names` must name one tensor or more, got none; leave it out for all of them.")
        samples = Samples(paths, names)
        versions = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths]
        key = (versions, list(samples.shapes), self.memory, self.increments)
        if self._cache is None or self._cache[0] != key:
            self._cache = (key, Components(samples, self.memory, self.increments))
        return self._cache[1]


@torch.no_grad()
def coefficients(basis: dict[str, Tensor], tensors: dict[str, Tensor], origin: dict[str, Tensor]) -> Tensor:
    """P^T (w - origin): [d], in float32 or the dtype of the basis if that is wider.

    A trajectory as d coefficients a sample (Li et al. 2021, section 3.3).

    Args:
        basis: P by tensor, [*shape, d].
        tensors, origin: w and the origin; tensors that the basis does not move are ignored.

    Raises:
        ValueError: if a tensor of the basis is missing, or of another shape.
    """
    _check_tensors(basis, tensors, origin)
    total = 0
    for name, columns in basis.items():
        w, w_0 = (each[name].to(columns.device, torch.float64) for each in (tensors, origin))
        for part, rows in zip((w - w_0).reshape(-1).split(2**16), _flat(columns).split(2**16), strict=True):
            total = total + part @ rows.to(torch.float64)
    return total.to(torch.promote_types(next(iter(basis.values())).dtype, torch.float32))


@torch.no_grad()
def reconstruct(basis: dict[str, Tensor], coefficients: Tensor, origin: dict[str, Tensor]) -> dict[str, Tensor]:
    """P c + origin, by tensor: the weights of d coefficients (Li et al. 2021, section 3.3).

    Raises:
        ValueError: if a tensor of the basis is missing, or of another shape.
    """
    _check_tensors(basis, origin)
    moved = {}
    for name, columns in basis.items():
        c = coefficients.to(columns.device, torch.promote_types(columns.dtype, torch.float32))
        parts = [rows.to(c.dtype) @ c for rows in _flat(columns).split(2**16)]
        increment = torch.cat(parts).view(origin[name].shape).to(origin[name].device)
        moved[name] = (increment + origin[name]).to(origin[name].dtype)
    return moved


def _flat(columns: Tensor) -> Tensor:
    return columns.reshape(-1, columns.shape[-1])


def _check_tensors(basis: dict[str, Tensor], *others: dict[str, Tensor]) -> None:
    for name, columns in basis.items():
        for other in others:
            if name not in other or other[name].shape != columns.shape[:-1]:
                shape = list(other[name].shape) if name in other else "none"
                raise ValueError(f"`{name}` must be of shape {list(columns.shape[:-1])} as in the basis, got {shape}.")
