"""Searches of a d that is known."""

from subspace_peft.measure import find_dimension


def step(truth: int):
    return lambda d, seed: float(d >= truth)


def find(train, *arguments, **options):
    return find_dimension(train, *arguments, **{"progress": False, "threshold": 0.5} | options)


class Flaky:
    """Raises at its n-th call, once."""

    def __init__(self, n: int, truth: int = 187):
        self.n, self.truth, self.calls = n, truth, []

    def __call__(self, d, seed):
        self.calls.append((d, seed))
        if len(self.calls) == self.n:
            raise ArithmeticError("the loss is gone")
        return float(d >= self.truth)
