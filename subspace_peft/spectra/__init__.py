"""What training does to a network: singular subspaces of its weights over time, and the features of its layers."""

from .angles import principal_angles, vector_angles
from .callback import SpectraCallback
from .features import ClassFeatures
from .layers import class_features, first_tensor
from .matrices import matrices
from .record import BLOCKS, SIDES, Spectra, blocks


__all__ = [
    "BLOCKS",
    "SIDES",
    "ClassFeatures",
    "Spectra",
    "SpectraCallback",
    "blocks",
    "class_features",
    "first_tensor",
    "matrices",
    "principal_angles",
    "vector_angles",
]
