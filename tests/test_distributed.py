"""Two processes on the CPU (gloo): they find the same theta_d as one process, and exchange d numbers a step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from subspace_peft import find_rates
from tests import distributed
from tests.cases import BY_NAME, wrap


ROOT = Path(__file__).parent.parent
# Without a GPU, --multi_gpu starts several processes on the CPU; --cpu would start one in spite of --num_processes.
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def alone() -> list[float]:
    vector = distributed.train(wrap(BY_NAME["mlp"]).train())
    assert max(map(abs, vector)) > 1e-2
    return vector


@pytest.fixture(scope="module")
def together() -> dict:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", *LAUNCH, "-m", "tests.distributed"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if "RESULTS " in line)
    return json.loads(line.split("RESULTS ")[1])


def test_replicated_training_is_that_of_one_process(alone, together):
    assert together["processes"] == 2
    assert together["replicated"]["theta_d"] == pytest.approx(alone, rel=1e-5, abs=1e-6)


def test_a_step_exchanges_d_numbers(together):
    assert together["replicated"]["moved"] == [7] * distributed.STEPS


def test_processes_find_one_rate_or_none(together):
    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    alone = find_rates(wrap(BY_NAME["mlp"]), rows, 100).theta_d
    assert together["rates"]["both"] == pytest.approx(alone, rel=1e-5)
    assert together["rates"]["one"] == pytest.approx(alone, rel=1e-5)
    assert together["rates"]["none"].startswith("A batch must have samples with different outputs")


def test_one_process_records_the_whole_model_and_all_can_read_it(together):
    for sharding in ("replicated", "sharded"):
        assert together["recorded"][sharding] == {"wrote": 1, "whole": 2, "samples": 2}


def test_one_process_has_the_spectra_of_the_whole_model(together):
    for kind in ("sharded", "adapted"):
        assert together["watched"][kind] == {"recorded": 1, "same": 1}


@pytest.mark.parametrize("kind", ["sharded", "flattened"])
def test_sharded_training_is_that_of_one_process(kind, alone, together):
    assert together[kind]["theta_d"] == pytest.approx(alone, rel=1e-5, abs=1e-6)


def test_what_would_be_wrong_with_several_processes_is_refused(together):
    added = "A target tensor must be whole when an adapter is added"
    merged = "A tensor must be whole to merge an adapter into it or out of it, `fc1.weight` is sharded; save"
    starts = {
        "add to FSDP2": f"{added}: `fc1.weight` is a DTensor",
        "add to FSDP": f"{added}, but the model is in FSDP",
    }
    reentrant = "Gradient checkpoints must not be reentrant where several processes train"
    starts |= dict.fromkeys(("reentrant checkpoints", "reentrant around others"), reentrant)
    starts |= dict.fromkeys(("merge in FSDP2", "unload from FSDP2", "merge in FSDP"), merged)
    for attempt, start in starts.items():
        assert together["refused"][attempt].startswith(start)
