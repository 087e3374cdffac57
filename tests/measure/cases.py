"""Searches for a d that is known."""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist

import numpy as np

from subspace_peft.measure import find_dimension


def step(truth: int):
    return lambda d, seed: float(d >= truth)


def find(train, *arguments, **options):
    return find_dimension(train, *arguments, **{"progress": False, "threshold": 0.5} | options)


def with_threads(train, threads: int = 4, **options):
    with ThreadPoolExecutor(threads) as executor:
        return find(train, **{"d_max": 1000, "executor": executor} | options)


def entries(file) -> list[dict]:
    """The lines of a file after its header, without the seconds."""
    lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


class Flaky:
    """Raise at the n-th call, and never again."""

    def __init__(self, n: int, truth: int = 187):
        self.n, self.truth, self.calls = n, truth, []

    def __call__(self, d, seed):
        self.calls.append((d, seed))
        if len(self.calls) == self.n:
            raise ArithmeticError("the loss is gone")
        return float(d >= self.truth)


def noisy(truth: int, width: float):
    """Success by the normal distribution of ln d, whose sd is the width; it depends on d and seed alone."""

    def train(d, seed):
        generator = np.random.default_rng([d, seed])
        return float(generator.random() < NormalDist(math.log(truth - 0.5), width).cdf(math.log(d)))

    return train


def at_least_20(d, seed):
    return np.float32(d >= 20)  # at the top level of a module, so that processes can import it


def no_metric(d, seed):
    return None


def killed(d, seed):
    os._exit(1)
