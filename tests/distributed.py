"""The program that test_distributed.py starts in two processes: training on parts of the same batches."""

import json
import os
import sys
import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.checkpoint import checkpoint

from subspace_peft import Spectra, Trajectory, find_rates
from subspace_peft.spectra import matrices
from tests.cases import BY_NAME, settings, theta_d, wrap


STEPS, BATCH = 4, 8


def train(model: nn.Module, process: int = 0, processes: int = 1) -> list[float]:
    """theta_d after some steps, in which this process gets its part of each batch."""
    (theta_d,) = (p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.SGD([theta_d], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        part = torch.randn(BATCH, 6, generator=generator).chunk(processes)[process]
        optimizer.zero_grad()
        model(part).square().mean().backward()
        optimizer.step()
    return (theta_d.full_tensor() if hasattr(theta_d, "full_tensor") else theta_d).detach().tolist()


def replicated(accelerator: Accelerator) -> dict:
    moved = []

    def count(state, bucket):
        moved.append(bucket.buffer().numel())
        return allreduce_hook(state, bucket)

    model = accelerator.prepare(wrap(BY_NAME["mlp"]).train())
    model.register_comm_hook(None, count)
    return {"theta_d": train(model, accelerator.process_index, accelerator.num_processes), "moved": moved}


def sharded(accelerator: Accelerator) -> dict:
    model = wrap(BY_NAME["mlp"]).train()
    for module in (model.base_model.model.fc1, model.base_model.model.fc2, model):
        fully_shard(module)
    return {"theta_d": train(model, accelerator.process_index, accelerator.num_processes)}


def flattened(accelerator: Accelerator) -> dict:
    """FSDP of version 1, whose units PEFT's policy chooses."""
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "SubspaceLayer"
    model = wrap(BY_NAME["mlp"]).train()
    model = in_fsdp(model, auto_wrap_policy=fsdp_auto_wrap_policy(model))
    train(model, accelerator.process_index, accelerator.num_processes)
    with FullyShardedDataParallel.summon_full_params(model):
        return {"theta_d": theta_d(model).tolist()}


def in_fsdp(model: nn.Module, **options) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"), **options)


def refused(accelerator: Accelerator) -> dict:
    """The errors where a tensor should be whole and is sharded, and whether all is as before."""
    plain, flat = BY_NAME["mlp"].model(), in_fsdp(BY_NAME["mlp"].model())
    adapted, flat_adapted = wrap(BY_NAME["mlp"]), wrap(BY_NAME["mlp"])
    replica, x = accelerator.prepare(wrap(BY_NAME["mlp"])), BY_NAME["mlp"].batch().requires_grad_()
    checkpoint(replica, x, use_reentrant=False).sum().backward()

    def inner(x):
        return checkpoint(replica, x, use_reentrant=False)

    fully_shard(plain)
    fully_shard(adapted)
    in_fsdp(flat_adapted)
    attempts = {
        "add to FSDP2": (plain, lambda: get_peft_model(plain, settings())),
        "add to FSDP": (flat, lambda: get_peft_model(flat, settings(target_modules=["fc1"]))),
        "merge in FSDP2": (adapted, adapted.merge_adapter),
        "unload from FSDP2": (adapted, adapted.merge_and_unload),
        "merge in FSDP": (flat_adapted, flat_adapted.merge_adapter),
        "reentrant checkpoints": (replica, lambda: checkpoint(replica, x, use_reentrant=True).sum().backward()),
        "reentrant around others": (replica, lambda: checkpoint(inner, x, use_reentrant=True).sum().backward()),
    }
    results = {}
    for name, (model, attempt) in attempts.items():
        before, message = str(model), None
        try:
            attempt()
        except ValueError as error:
            message = str(error)
        results[name] = message if str(model) == before else "the model has changed"
    return results


def recorded(accelerator: Accelerator) -> dict:
    """For a replicated and a sharded model: how many processes write a sample, and read the plain model from it."""
    plain, parts = BY_NAME["mlp"].model(), BY_NAME["mlp"].model()
    for module in (parts.fc1, parts):
        fully_shard(module)
    models = {"replicated": accelerator.prepare(BY_NAME["mlp"].model()), "sharded": parts}
    weights, results = dict(plain.named_parameters()), {}
    with tempfile.TemporaryDirectory() as folder:
        (folder,) = broadcast_object_list([folder])
        for name, model in models.items():
            trajectory = Trajectory(f"{folder}/{name}")
            wrote = trajectory.add(model) is not None
            sample = trajectory.sample(0)  # every process can read it as soon as `add` returns
            whole = sample.keys() == weights.keys() and all(torch.equal(sample[n], p) for n, p in weights.items())
            counts = accelerator.reduce(torch.tensor([int(wrote), int(whole), len(trajectory)]))
            results[name] = dict(zip(("wrote", "whole", "samples"), counts.tolist(), strict=True))
        accelerator.wait_for_everyone()
    return results


def watched(accelerator: Accelerator) -> dict:
    """For sharded models, plain and adapted: how many processes record spectra, and get the right values."""
    plain, parts, adapted = BY_NAME["mlp"].model(), BY_NAME["mlp"].model(), wrap(BY_NAME["mlp"])
    with torch.no_grad():
        next(p for p in adapted.parameters() if p.requires_grad).fill_(0.1)
    expected = {"sharded": dict(matrices(plain)), "adapted": dict(matrices(adapted))}
    for module in (parts.fc1, parts, adapted.base_model.model.fc1, adapted):
        fully_shard(module)
    results = {}
    for name, model in {"sharded": parts, "adapted": adapted}.items():
        spectra = Spectra(rank=2)
        spectra.add(model)
        same = spectra.weights == list(expected[name]) and all(
            torch.allclose(spectra.singular_values(n)[0], torch.linalg.svdvals(w.double()))
            for n, w in expected[name].items()
        )
        counts = accelerator.reduce(torch.tensor([len(spectra), int(same)]))
        results[name] = dict(zip(("recorded", "same"), counts.tolist(), strict=True))
    return results


def rates(accelerator: Accelerator) -> dict:
    """Of batches of one process and of both; where that of one process has one row, and where both have one."""
    model, rows = wrap(BY_NAME["mlp"]), torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    parts = {"both": 8, "one": 8 if accelerator.is_main_process else 1, "none": 1}
    results = {}
    for name, count in parts.items():
        try:
            results[name] = find_rates(model, rows[:count], 100).theta_d
        except ValueError as error:
            results[name] = str(error)
    return {name: broadcast_object_list([value, None], 1)[0] for name, value in results.items()}


KINDS = (replicated, sharded, flattened, refused, recorded, watched, rates)


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    results = {kind.__name__: kind(accelerator) for kind in KINDS}
    if accelerator.is_main_process:
        print("RESULTS " + json.dumps({"processes": accelerator.num_processes, **results}))
    accelerator.wait_for_everyone()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort some processes when the interpreter takes them down
