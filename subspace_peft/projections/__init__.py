"""The projections P: one file each, and the only list of them."""

from .base import JointCache, Projection, TensorRows
from .basis import Basis
from .coordinate import Coordinate
from .dense import Dense
from .fastfood import Fastfood
from .fastjl import FastJL
from .identity import Identity
from .kronecker import Kronecker
from .sparse import Sparse


PROJECTIONS: dict[str, type[Projection]] = {
    "dense": Dense,
    "sparse": Sparse,
    "fastfood": Fastfood,
    "fastjl": FastJL,
    "kronecker": Kronecker,
    "basis": Basis,
    "coordinate": Coordinate,
    "identity": Identity,
}

__all__ = ["PROJECTIONS", "JointCache", "Projection", "TensorRows"]
