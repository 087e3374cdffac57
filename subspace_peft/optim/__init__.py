"""Second-order optimisers that a subspace makes possible: torch optimisers whose step takes a closure."""

from .class_gradient import ClassGradientNewton, ClassGradients, class_gradients
from .closure import repeatable
from .pbfgs import PBFGS, PPlusBFGS
from .search import Armijo, Step


__all__ = [
    "PBFGS",
    "Armijo",
    "ClassGradientNewton",
    "ClassGradients",
    "PPlusBFGS",
    "Step",
    "class_gradients",
    "repeatable",
]
