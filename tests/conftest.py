"""Settings of all tests: one thread for tiny tensors, and every warning is an error except unavoidable ones."""

import gc

import hypothesis
import pytest
import torch


UPSTREAM = [
    # peft 0.21 uses an attribute that transformers 5.23 deprecates
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # torch 2.13 compiles the decompositions of its forward mode with it
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
]


@pytest.fixture(scope="module")
def smallest_n():
    """Kronecker mixes small tensors too, which are otherwise the rows of `fastjl`."""
    with pytest.MonkeyPatch.context() as context:
        context.setattr("subspace_peft.projections.kronecker.SMALLEST_N", 4)
        yield


def pytest_addoption(parser):
    parser.addoption("--device", default="cuda", help="of the tests that are marked gpu")


def pytest_collection_modifyitems(config, items):
    if torch.device(config.getoption("--device")).type != "cuda" or torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="CUDA is not there; --device cpu runs the same code without it"))


def pytest_configure(config):
    for line in UPSTREAM:
        config.addinivalue_line("filterwarnings", line)
    torch.set_num_threads(1)
    hypothesis.settings.register_profile("tests", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("tests")


def pytest_collection_finish():
    """Keep imported objects out of the garbage collections that Trainer and accelerate run after each training."""
    gc.collect()
    gc.freeze()
