"""Second-order optimisers that a subspace makes possible: torch optimisers whose step takes a closure."""

from .class_gradient import ClassGradients, class_gradients
from .class_gradient_newton import ClassGradientNewton
from .closure import repeatable
from .line_search import Armijo, Step
from .pbfgs import PBFGS, PPlusBFGS


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
