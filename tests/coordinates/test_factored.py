"""Factored: a module that runs through two factors computes what it computes with their product."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from subspace_peft.coordinates.factored import operation, run


MODULES = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "linear on tokens": (lambda: nn.Linear(6, 5, bias=False), (3, 2, 6)),
    "Conv1D": (lambda: Conv1D(5, 6), (3, 2, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2), (3, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=1, padding_mode="reflect"), (3, 4, 7, 7)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False), (3, 4, 7, 7)),
    "conv2d of one image": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (3, 2, 4, 4, 4)),
    "embedding": (lambda: nn.Embedding(9, 5, padding_idx=2), None),
}


def factors(module, rank=2):
    generator = torch.Generator().manual_seed(1)
    rows, columns = module.weight.flatten(1).shape
    return [torch.randn(*shape, generator=generator) for shape in ((rows, rank), (rank, columns))]


def inputs(shape):
    return torch.randint(9, (3, 4)) if shape is None else torch.randn(shape)


@pytest.mark.parametrize("name", MODULES)
def test_it_is_the_module_with_the_product_as_its_weight(name):
    build, shape = MODULES[name]
    module, x = build(), inputs(shape)
    left, right = (factor.requires_grad_() for factor in factors(module))
    output = run(module, x, left, right, getattr(module, "bias", None))
    dense = {"weight": (left @ right).view(module.weight.shape)}
    expected = torch.func.functional_call(module, dense, x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    probe = torch.randn_like(output)
    for ours, theirs in zip(
        torch.autograd.grad(output, (left, right), probe), torch.autograd.grad(expected, (left, right), probe),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "embedding"])
def test_it_costs_what_two_smaller_modules_cost(name):
    build, shape = MODULES[name]
    module, x = build(), inputs(shape)
    left, right = factors(module)
    with FlopCounterMode(display=False) as one:
        out = module(x)
    with FlopCounterMode(display=False) as two:
        run(module, x, left, right)
    rows, columns = module.weight.flatten(1).shape
    per_output = one.get_total_flops() / (rows * columns)
    assert two.get_total_flops() == pytest.approx(per_output * 2 * (rows + columns))
    assert out.numel()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MODULES)
def test_it_computes_in_the_dtype_of_the_module(name, dtype):
    build, shape = MODULES[name]
    module, x = build().to(dtype), inputs(shape)
    x = x.to(dtype) if x.is_floating_point() else x
    assert run(module, x, *factors(module), getattr(module, "bias", None)).dtype == dtype


@pytest.mark.parametrize("name", MODULES)
def test_under_autocast_it_gives_the_dtype_of_the_module(name):
    build, shape = MODULES[name]
    module, x = build(), inputs(shape)
    with torch.autocast("cpu", torch.bfloat16):
        assert run(module, x, *factors(module), getattr(module, "bias", None)).dtype == module(x).dtype


class Own(nn.Linear):
    """A Linear that computes something else."""

    def forward(self, x):
        return super().forward(x).exp()


@pytest.mark.parametrize(
    "module", [Own(3, 3), nn.Conv2d(4, 4, 3, groups=2), nn.LayerNorm(3), nn.ConvTranspose2d(3, 3, 2)]
)
def test_other_modules_have_no_such_operation(module):
    assert operation(module) is None
