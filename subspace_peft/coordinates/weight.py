"""Weight: the target tensor itself moves."""

from .base import Coordinates


class Weight(Coordinates):
    """W = W_0 + P z, entry by entry."""

    @staticmethod
    def parts(shape, rank, factors=2):
        return {"": tuple(shape)}

    def increment(self, z):
        return self.projections[""](z).reshape((*z.shape[:-1], *self.shape))

    def moved_from(self, origin, z):
        return self.projections[""](z, origin)
