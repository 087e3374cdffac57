"""The geometry of the loss, and which affine subspaces meet its sublevel sets (equations: Larsen et al. 2021)."""

from .angular import directions_support, local_angular_dimension, local_dimension_bound, local_dimension_limit
from .hessian import coverage, hessian_product, lanczos
from .linearized import Linearized, linearized
from .well import affine_distance, affine_threshold, lowest_losses, radii, random_lowest_losses, success
from .width import Estimate, ellipsoid_support, ellipsoid_width_bounds, escape_probability, gaussian_width


__all__ = [
    "Estimate",
    "Linearized",
    "affine_distance",
    "affine_threshold",
    "coverage",
    "directions_support",
    "ellipsoid_support",
    "ellipsoid_width_bounds",
    "escape_probability",
    "gaussian_width",
    "hessian_product",
    "lanczos",
    "linearized",
    "local_angular_dimension",
    "local_dimension_bound",
    "local_dimension_limit",
    "lowest_losses",
    "radii",
    "random_lowest_losses",
    "success",
]
