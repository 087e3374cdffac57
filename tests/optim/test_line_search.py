"""The line search by the Armijo condition."""

import pytest

from subspace_peft.optim import Armijo, Step


def test_the_first_alpha_that_meets_the_condition():
    alphas = []

    def loss(alpha):
        alphas.append(alpha)
        return (alpha - 0.25) ** 2

    # slope -0.5, c = 0.4: (a - 0.25)^2 <= 0.0625 - 0.2 a, that is a <= 0.3
    assert Armijo(c=0.4, beta=0.5)(loss, 0.0625, -0.5) == Step(0.25, 0.0, 3)
    assert alphas == [1.0, 0.5, 0.25]
    assert Armijo(c=0.4, beta=0.5, max_trials=2)(loss, 0.0625, -0.5) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_trial_that_is_not_finite_fails(bad):
    assert Armijo(beta=0.5)(lambda alpha: bad if alpha > 0.3 else -1.0, 0.0, -1.0) == Step(0.25, -1.0, 3)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"c": 0.0}, "`c` must be between 0 and 1, got 0.0"),
        ({"beta": 1.0}, "`beta` must be between 0 and 1, got 1.0"),
        ({"beta": float("nan")}, "`beta` must be"),
        ({"max_trials": 0}, "`max_trials` must be a whole number of at least 1, got 0"),
        ({"max_trials": 2.5}, "`max_trials` must be"),
    ],
)
def test_numbers_of_the_search(numbers, message):
    with pytest.raises(ValueError, match=message):
        Armijo(**numbers)
