"""Weight: the target tensor itself moves."""

from .base import Coordinates


class Weight(Coordinates):
    """theta is the tensor itself: W = W_0 + P z."""

    @staticmethod
    def parts(shape, rank, factors=2):
        return {"": tuple(shape)}

    def increment(self, z):
        return self.projections[""](z).reshape((*z.shape[:-1], *self.shape))

    def moved_from(self, origin, z):
        return self.projections[""](z, origin)
