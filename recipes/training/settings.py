"""Settings of a training: a flat record, from which its result gets its name."""

from dataclasses import dataclass

from recipes.lab.settings import Named, unnamed
from recipes.tasks.models import SHAPES, check
from recipes.training.optimizers import OPTIMIZERS, SCHEDULES
from subspace_peft.adapter.config import NORMALIZATIONS
from subspace_peft.coordinates.starts import STARTS
from subspace_peft.projections import PROJECTIONS


COMMON = ("dataset", "model", "seed", "images", "augment", "standardize", "center", "measured", "data", "threads")
"""Settings that a run and its trajectory share."""
CHOICES = {
    "dataset": SHAPES,
    "projection": ["full", *PROJECTIONS],
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "start": STARTS,
    "normalization": NORMALIZATIONS,
}
LEAST = {"epochs": 1, "batch_size": 1, "projection_seed": -1}
LEAST |= dict.fromkeys(("nnz_per_row", "images", "measured", "burn_in", "samples", "sample_steps", "decay_epoch"), 0)
LEAST |= dict.fromkeys(("momentum", "weight_decay", "burn_in_lr", "threads", "together"), 0)
"""The smallest value of each number; `d`, `lr` and `rank` depend on other settings."""


@dataclass(frozen=True)
class Settings(Named):
    """One training of a network, in the whole space or in a subspace."""

    dataset: str = "digits"
    model: str = "lenet"
    projection: str = "full"  # full: every parameter is trained, without a subspace
    d: int = 0
    seed: int = 0  # draws the network, P and the order of the batches
    projection_seed: int = -1  # draws P; -1: `seed` does, so each run has another P, as success probabilities need
    normalization: str = "columns"
    nnz_per_row: int = 0  # 0: the default of the projection
    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "adam"
    lr: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "constant"
    decay_epoch: int = 0  # schedule "step": the learning rate is a tenth after this epoch
    images: int = 0  # the first so many of the training set; 0: all
    augment: bool = False  # flips and crops in every batch
    standardize: bool = False  # inputs of zero mean and unit variance in each channel
    center: bool = False  # the mean image is subtracted from the inputs
    measured: int = 0  # loss and accuracy on the first so many training images are measured after each epoch
    burn_in: int = (
        0  # steps of SGD with momentum 0.9 in the whole space before the origin is taken; t in Larsen et al.
    )
    burn_in_lr: float = 0.05
    samples: int = 0  # basis: spans the weights at the start of the trajectory and after this many of its epochs
    increments: bool = False  # basis: spans the differences of successive samples instead, a lottery subspace
    sample_steps: int = 0  # trajectory: a sample after every so many steps; 0: after each epoch
    pruned: bool = False  # coordinate: weights that do not move are zero, as in random pruning and lottery tickets
    rank: int = 0  # identity: linear layers between others are two factors of this inner width, other layers are whole
    start: str = "svd"  # rank: where the factors start
    trajectory: "Settings | None" = None  # the full training whose samples give the basis or the lottery ticket
    data: str = unnamed("")  # a folder of parquet files, or another Hub id
    threads: int = unnamed(0)  # 0: torch's choice
    together: int = unnamed(
        0
    )  # runs with one `projection_seed` that train at once, see together.py; 0 or 1: each alone
    save_adapter: bool = unnamed(False)
    save_trajectory: bool = unnamed(False)  # full training: keep a sample at the start and after each epoch

    def __post_init__(self):
        self._check(CHOICES, LEAST)
        if not self.lr > 0:
            raise ValueError(f"`lr` must be above 0, got {self.lr}.")
        check(self.model)
        if isinstance(self.trajectory, dict):  # as in the record
            object.__setattr__(self, "trajectory", Settings(**self.trajectory))
        if self.projection == "full":
            self._reset("d", "normalization", "nnz_per_row", "save_adapter", "burn_in", "rank")
        elif self.d < 1 and self.projection != "identity":
            raise ValueError(f"`d` must be at least 1 for projection {self.projection!r}, got {self.d}; give `d`.")
        if self.projection != "full":
            self._reset("save_trajectory", "sample_steps")
        if self.rank:
            self._check_rank()
        else:
            self._reset("start")
        if not self.burn_in:
            self._reset("burn_in_lr")
        if self.projection == "basis":
            self._check_trajectory()
        else:
            self._reset("samples", "increments")
        if self.projection != "coordinate":
            self._reset("pruned")
        if self.projection not in ("basis", "coordinate"):
            self._reset("trajectory")
        if self.projection in ("full", "identity", "basis", "coordinate"):
            self._reset("projection_seed")  # no P of theirs is drawn from it
        if self.projection == "coordinate" and self.trajectory and self.trajectory.sample_steps:
            raise ValueError(
                "`sample_steps` must be 0 for a lottery ticket: it is made of the trajectory's last epoch."
            )
        if "bfgs" in self.optimizer:
            if self.projection == "full":
                raise ValueError(f"`optimizer` {self.optimizer!r} trains theta_d; give a `projection`, got 'full'.")
            self._reset("lr", "schedule", "decay_epoch", "weight_decay")
        if "class_gradient" in self.optimizer or self.optimizer == "adam_larsen":
            self._reset("weight_decay")
        if "pplusbfgs" in self.optimizer and self.save_adapter:
            raise ValueError(
                f"`save_adapter` must be false with {self.optimizer!r}: it trains the base too, which an adapter's "
                "file does not hold."
            )
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"`momentum` belongs to optimizer 'sgd', got {self.optimizer!r}; leave it out.")

    def _check_rank(self) -> None:
        if self.rank < 0:
            raise ValueError(f"`rank` must be at least 1, or 0 for weights that are no product, got {self.rank}.")
        if self.projection != "identity":
            raise ValueError(
                f"`rank` belongs to projection 'identity', whose d is the size of the factors, got "
                f"{self.projection!r}; leave one of them out."
            )
        self._reset("d")

    def _check_trajectory(self) -> None:
        if self.trajectory is None:
            raise ValueError(
                "`trajectory` must be given for projection 'basis': the settings of the sampled training."
            )
        if self.samples < self.d:
            raise ValueError(f"`samples` must be at least d = {self.d}, got {self.samples}; give more `samples`.")
        if not self.trajectory.sample_steps and self.samples > self.trajectory.epochs:
            raise ValueError(
                f"`samples` must be at most the {self.trajectory.epochs} epochs of the trajectory, got {self.samples}."
            )

    @property
    def last_sample(self) -> int:
        """How many samples after the start of its trajectory this run needs."""
        if self.trajectory is None:
            return 0
        return self.samples or self.trajectory.epochs

    def __str__(self) -> str:
        optimizer = f" {self.optimizer}" if self.optimizer != Settings.optimizer else ""
        size = f" d={self.d}" if self.d else f" rank={self.rank}" if self.rank else ""
        return f"{self.model} {self.projection}{size}{optimizer} seed={self.seed}"
