"""Trainer under DDP, FSDP and DeepSpeed in two processes: theta_d and file of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file

from tests import distributed_sharded as sharded


@pytest.fixture(scope="module")
def together() -> dict:
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.distributed_sharded"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULTS "))
    return json.loads(line.removeprefix("RESULTS "))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return {kind: sharded.train(kind, str(tmp_path_factory.mktemp(kind)))[0] for kind in sharded.KINDS}


def assert_same_file(file: dict, expected: dict) -> None:
    assert file.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(torch.tensor(file[key]), torch.tensor(values), rtol=1e-4, atol=1e-5)
    assert max(map(abs, next(values for key, values in file.items() if key.endswith("theta_d")))) > 0.01


@pytest.mark.parametrize("kind", sharded.KINDS)
@pytest.mark.parametrize("sharding", sharded.SHARDINGS)
def test_the_file_is_that_of_one_process(sharding, kind, together, alone):
    assert_same_file(together[sharding][kind]["file"], alone[kind])


@pytest.mark.parametrize("sharding", sharded.SHARDINGS[1:])
def test_the_rate_that_is_found_is_that_of_data_parallelism(sharding, together):
    assert_same_file(together[sharding][sharded.FOUND]["file"], together["ddp"][sharded.FOUND]["file"])


@pytest.mark.parametrize("sharding", sharded.SHARDINGS)
def test_a_rate_at_which_theta_d_hardly_moves_is_warned_of_once(sharding, together):
    """But under DeepSpeed, whose optimiser holds other tensors."""
    warned = {kind: together[sharding][kind]["warned"] for kind in (*sharded.KINDS, sharded.FOUND, sharded.SLOW)}
    assert warned == dict.fromkeys(warned, 0) | {sharded.SLOW: int(sharding not in sharded.ZERO)}


@pytest.mark.parametrize("kind", sharded.RESUMED)
@pytest.mark.parametrize("sharding", sharded.RESUMABLE)
def test_a_resumed_training_ends_where_the_whole_one_did(sharding, kind, together):
    results = together[sharding][kind]
    assert_same_file(results["resumed"], results["file"])


@pytest.mark.parametrize(("sharding", "numbers"), [("ddp", 7), ("fsdp2", 8)])
def test_a_step_reduces_d_numbers_or_as_many_as_two_processes_share(sharding, numbers, together):
    moved = {kind: together[sharding][kind]["moved"] for kind in sharded.KINDS}
    assert moved == {kind: [numbers] * sharded.STEPS for kind in sharded.KINDS}


def test_a_step_under_fsdp1_reduces_the_frozen_weights_beside_theta_d_too(together):
    numbers = 8 + sum(parameter.numel() for parameter in sharded.Net().parameters())
    for kind in sharded.KINDS:
        moved = together["fsdp1"][kind]["moved"]
        assert [count for count in moved if count > 1] == [numbers] * sharded.STEPS  # 1: the gradient's norm


@pytest.mark.parametrize(("sharding", "numbers"), [*zip(sharded.ZERO, (7, 8), strict=False)])
def test_a_step_under_deepspeed_does_likewise(sharding, numbers, together):
    for kind in sharded.KINDS:
        assert together[sharding][kind]["moved"] == [numbers, 1] * sharded.STEPS  # 1: the gradient's norm


@pytest.mark.parametrize(("name", "kind"), sharded.parts() if sharded.ZERO else [])
def test_a_model_of_which_each_process_holds_a_part_of_every_tensor(name, kind, together):
    alone = sharded.train_case(name, kind)
    assert together["zero3"]["parts"][f"{name} {kind}"] == pytest.approx(alone, abs=1e-5)
    assert max(map(abs, alone)) > 0.01


@pytest.mark.parametrize("file", sorted(sharded.YAMLS.glob("*.yaml")), ids=lambda file: file.name)
def test_every_yaml_is_read_by_accelerate(file):
    config = load_config_from_file(str(file))
    assert config.mixed_precision == "no"
    assert config.num_processes == (1 if file.stem in ("cpu", "gpu") else 2)
