"""Small tensors in place of large ones."""

import pytest


@pytest.fixture(scope="module")
def smallest_n():
    """Kronecker mixes small tensors too, which are otherwise the rows of `fastjl`."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr("subspace_peft.projections.kronecker.SMALLEST_N", 4)
        yield
