"""How training changes a network: singular subspaces of its weights over time, and the features of its layers."""

from .angles import principal_angles, vector_angles
from .callback import SpectraCallback
from .features import ClassFeatures
from .layers import class_features, first_tensor
from .matrices import matrices
from .record import BANDS, SIDES, Spectra, bands


BLOCKS, blocks = BANDS, bands  # aliases

__all__ = [
    "BANDS",
    "BLOCKS",
    "SIDES",
    "ClassFeatures",
    "Spectra",
    "SpectraCallback",
    "bands",
    "blocks",
    "class_features",
    "first_tensor",
    "matrices",
    "principal_angles",
    "vector_angles",
]
