"""Fine-tuning in subspaces as a Hugging Face PEFT method: theta = origin + P theta_d.

Importing this package makes the adapter type SUBSPACE_PEFT known to PEFT.
"""

from .adapter.compress import compress
from .adapter.config import SubspaceConfig
from .adapter.fold import fold
from .adapter.model import SubspaceModel
from .adapter.register import register
from .projections import PROJECTIONS
from .rates import Rates, find_rates, gamma_for, parameter_groups
from .spectra import Spectra, SpectraCallback
from .trajectory import Trajectory, TrajectoryCallback, coefficients, reconstruct


register()

__all__ = [
    "PROJECTIONS",
    "Rates",
    "Spectra",
    "SpectraCallback",
    "SubspaceConfig",
    "SubspaceModel",
    "SubspaceTrainer",
    "Trajectory",
    "TrajectoryCallback",
    "coefficients",
    "compress",
    "find_rates",
    "fold",
    "gamma_for",
    "parameter_groups",
    "reconstruct",
]


def __getattr__(name: str):
    if name == "SubspaceTrainer":  # imported when asked for, because transformers' Trainer is slow to import
        from .trainer import SubspaceTrainer

        return SubspaceTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
