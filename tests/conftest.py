"""Settings of all tests: one thread for tiny tensors, and no warnings but those that cannot be avoided."""

import gc

import hypothesis
import torch


UPSTREAM = [
    # peft 0.21 asks transformers 5.23 under the old name
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # torch 2.13 compiles the decompositions of its forward-mode derivatives with it
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
]


def pytest_configure(config):
    for line in UPSTREAM:
        config.addinivalue_line("filterwarnings", line)
    torch.set_num_threads(1)
    hypothesis.settings.register_profile("tests", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("tests")


def pytest_collection_finish():
    """Trainer and accelerate collect garbage after each training: all that was imported stays out of it."""
    gc.collect()
    gc.freeze()
