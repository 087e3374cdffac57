"""Fixtures of the recipes: small YAMLs."""

from pathlib import Path

import pytest

from recipes import run
from tests.recipes.files import written


@pytest.fixture
def recipe(tmp_path) -> Path:
    settings = ["model: fc", "batch_size: 256", "epochs: 2", "lr: 0.1", "projection: [full, fastjl]", "d: [3, 4]"]
    return written(tmp_path / "tiny.yaml", *settings, "threads: 1")


@pytest.fixture
def dldr(tmp_path) -> Path:
    shared = ["report: optimisers", "model: fc", "batch_size: 256", "threads: 1", "runs:"]
    sgd = "  - &sgd {optimizer: sgd, lr: 0.1, epochs: 4}"
    basis = "  - {projection: basis, d: 2, samples: 3, trajectory: *sgd, optimizer: [pbfgs, pplusbfgs], epochs: 1}"
    return written(tmp_path / "dldr.yaml", *shared, sgd, basis)


@pytest.fixture
def unreported(monkeypatch):
    """Tables and figures are not what the test is about, and take longer than its runs."""
    monkeypatch.setattr(run, "conclude", lambda *rest: None)
