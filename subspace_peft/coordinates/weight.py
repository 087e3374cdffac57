"""Weight: the target tensor itself moves."""

from torch import Tensor

from .base import Coordinates, Shape, with_row, without_row


class Weight(Coordinates):
    """W = W_0 + strength P z, entry by entry."""

    @staticmethod
    def parts(shape, rank, factors=2, is_stacked=False):
        return {"": tuple(shape)}

    def increment(self, z):
        rows = self.projections[""](self._scaled(z))
        return self.with_padding(rows.reshape((*z.shape[:-1], *Shape(self.shape, self.padding).moving)))

    def moved_from(self, origin, z):
        z = self._scaled(z)
        if self.padding is None:
            return self.projections[""](z, origin)
        moved = self.projections[""](z, without_row(origin, self.padding))
        return with_row(moved, origin[self.padding : self.padding + 1], self.padding)

    def product(self, x: Tensor, z: Tensor, transposed: bool, output: Tensor) -> Tensor:
        """The output plus x Wᵀ, or x W if `transposed`, for the increment W of z, which is not formed."""
        return self.projections[""].product(x, self._scaled(z), transposed, output)

    def look_up(self, at: Tensor, z: Tensor, output: Tensor) -> Tensor:
        """The output plus the rows at these indices of the increment of z, a matrix that is not formed."""
        moving = at if self.padding is None else (at - (at >= self.padding).to(at.dtype)).clamp_min(0)
        rows = self.projections[""].look_up(moving, self._scaled(z))
        if self.padding is not None:
            rows = rows * (at != self.padding).unsqueeze(-1)
        return (output + rows).to(output.dtype)

    def _scaled(self, z):
        return z if self.strength == 1 else z * self.strength
