"""Fine-tuning in subspaces: theta = origin + P theta_d, as a Hugging Face PEFT method.

Importing this package makes the adapter type SUBSPACE_PEFT known to PEFT.
"""

from .config import SubspaceConfig
from .groups import parameter_groups
from .model import SubspaceModel
from .projections import PROJECTIONS
from .register import register


register()

__all__ = ["PROJECTIONS", "SubspaceConfig", "SubspaceModel", "parameter_groups"]
