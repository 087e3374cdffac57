import pytest
import torch
from scipy.linalg import hadamard as reference

from subspace_peft.projections.hadamard import hadamard, matrix, next_power_of_two


@pytest.mark.parametrize("k", range(11))
def test_is_the_natural_hadamard_matrix(k):
    expected = torch.tensor(reference(2**k), dtype=torch.float64)
    assert torch.equal(matrix(2**k, torch.float64), expected)
    assert torch.equal(hadamard(torch.eye(2**k, dtype=torch.float64)), expected)


@pytest.mark.parametrize("k", [12, 17, 18])
def test_large_transforms(k):
    x = torch.randn(2, 2**k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x
    for i in range(k):  # the butterfly
        y = y.view(2, -1, 2, 2**i)
        y = torch.stack((y[:, :, 0] + y[:, :, 1], y[:, :, 0] - y[:, :, 1]), 2)
    torch.testing.assert_close(hadamard(x), y.view(2, -1))


@pytest.mark.parametrize("size", [8, 1024])
def test_pads_with_zeros(size):
    x = torch.arange(5.0)
    assert torch.equal(hadamard(x, size), hadamard(torch.cat((x, torch.zeros(size - 5)))))


def test_batches_and_derivatives():
    x = torch.randn(2, 3, 512, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(hadamard(x)[1, 2], hadamard(x[1, 2]))
    (grad,) = torch.autograd.grad(hadamard(x).sum(), x)
    assert torch.equal(grad[0, 0], 512 * torch.eye(512, dtype=torch.float64)[0])


@pytest.mark.parametrize(("n", "power"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (5000, 8192)])
def test_next_power_of_two(n, power):
    assert next_power_of_two(n) == power
