"""Weight: the target tensor itself moves."""

from .base import Coordinates


class Weight(Coordinates):
    """W = W_0 + strength P z, entry by entry."""

    @staticmethod
    def parts(shape, rank, factors=2, is_stacked=False):
        return {"": tuple(shape)}

    def increment(self, z):
        return self.projections[""](self._scaled(z)).reshape((*z.shape[:-1], *self.shape))

    def moved_from(self, origin, z):
        return self.projections[""](self._scaled(z), origin)

    def _scaled(self, z):
        return z if self.strength == 1 else z * self.strength
