"""The program that test_sharded.py starts in two processes: Trainer under the YAMLs of recipes/accelerate.

accelerate shards on GPUs alone. Here it takes the two processes on the CPU for two GPUs. After that the models of
cases.py train under DeepSpeed's ZeRO-3, with every tensor in parts.
"""

import contextlib
import importlib.util
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from recipes import run
from subspace_peft import SubspaceTrainer
from tests.cases import BY_NAME, loss, settings, theta_d


YAMLS = Path(run.__file__).parent / "accelerate"
ZERO = ("zero2", "zero3") if importlib.util.find_spec("deepspeed") else ()
"""DeepSpeed is for Linux; there the tests' environment has it."""
SHARDINGS = ("ddp", "fsdp2", "fsdp1", *ZERO)
LOW_RANK = {"coordinates": "low_rank", "rank": 2}
KINDS = {name: {"projection": name} for name in ("fastjl", "kronecker", "sparse")} | {"low_rank": LOW_RANK}
STEPS, ROWS = 4, 8
FOUND, SLOW = "rate found", "Trainer's own rate"
RESUMED = ("fastjl", FOUND)
"""Also trained again from the checkpoint in the middle."""
RESUMABLE = ("ddp", "fsdp2", *ZERO)
"""Under FSDP1 accelerate 1.15 loads no adapter of PEFT: it looks for its keys without those of the wrapper."""


PARTS = ("convnet", "embeddings", "attention", "recurrent", "tied", "encoder", "llama", "gpt2")
PART_KINDS = {
    "kronecker": {"projection": "kronecker"},
    "low_rank": {**LOW_RANK, "parameters": ["weight"]},
    "early": {"projection": "fastjl"},
}
"""How a model moves; "early": it is in parts already when the adapter is added."""
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 1},
}


class Rows(Dataset):
    def __len__(self):
        return ROWS * STEPS

    def __getitem__(self, i):
        x = torch.randn(16, generator=torch.Generator().manual_seed(i))
        return {"x": x, "labels": x[:4].argmax()}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x, labels=None):
        logits = self.last(torch.tanh(self.first(x)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Reductions(TorchDispatchMode):
    """Counts the numbers that each reduction takes from this process; integers are no gradients."""

    def __init__(self):
        super().__init__()
        self.numbers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and "reduce" in func._opname:
            source = args["reduce_scatter" in func._opname]
            tensors = [source] if isinstance(source, torch.Tensor) else source
            self.numbers += [tensor.numel() for tensor in tensors if tensor.is_floating_point()]
        return func(*args, **(kwargs or {}))


def train(kind: str, folder: str, processes: int = 1, resume: bool = False) -> tuple[dict, list[int]]:
    """The adapter's file after training, and how many numbers each reduction held."""
    torch.manual_seed(0)
    model = get_peft_model(Net(), settings(**KINDS.get(kind, {}), target_modules="all-linear"))
    args = TrainingArguments(
        output_dir=folder, max_steps=STEPS, per_device_train_batch_size=ROWS // processes,
        lr_scheduler_type="constant", save_steps=STEPS // 2, report_to=[], disable_tqdm=True, seed=0,
        use_cpu="ACCELERATE_TORCH_DEVICE" not in os.environ, **({"learning_rate": 0.05} if kind in KINDS else {}),
    )  # fmt: skip
    trainer = (SubspaceTrainer if kind == FOUND else Trainer)(model=model, args=args, train_dataset=Rows())
    with Reductions() as reductions:
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{STEPS // 2}" if resume else None)
    trainer.save_model(f"{folder}/saved")
    if processes > 1:
        torch.distributed.barrier()
    file = load_file(f"{folder}/saved/adapter_model.safetensors")
    return {name: tensor.tolist() for name, tensor in file.items()}, reductions.numbers


def environment(sharding: str, port: int) -> dict[str, str]:
    """What `accelerate launch --config_file` would set."""
    given = ["--config_file", str(YAMLS / f"{sharding}.yaml"), "--main_process_port", str(port), "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    if not args.use_deepspeed:
        return prepare_multi_gpu_env(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(load_config_from_file(args.config_file).deepspeed_config)
    return prepare_deepspeed_cmd_env(args)[1]


def work(process: int, sharding: str, port: int, folder: str) -> None:
    os.environ.update(environment(sharding, port), RANK=str(process), LOCAL_RANK=str(process), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if sharding in ZERO:
        os.environ["DS_ACCELERATOR"] = "cpu"
        deepspeed_torch = importlib.import_module("deepspeed.comm.torch")
        deepspeed_torch.build_shm_op = lambda: None  # it would be compiled, and is only faster
    if sharding != "ddp":
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
        # torch moves the parameters of FSDP1 to the CPU, on which they are, and frees them: a segmentation fault
        FlatParamHandle.to_cpu = lambda self: contextlib.nullcontext()
    results = {}
    for kind in (*KINDS, FOUND, SLOW):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            file, moved = train(kind, f"{folder}/{kind}", processes=2)
        warned = sum("hardly moves" in str(each.message) for each in caught)
        again = file
        if kind in RESUMED and sharding in RESUMABLE:
            again, _ = train(kind, f"{folder}/{kind}", processes=2, resume=True)
        results[kind] = {"file": file, "resumed": again, "moved": moved, "warned": warned}
    if sharding == "zero3":
        results["parts"] = {f"{name} {kind}": train_case(name, kind, True) for name, kind in parts()}
    if process == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort some processes when the interpreter takes them down


def parts() -> list[tuple[str, str]]:
    return [(name, kind) for name in PARTS for kind in PART_KINDS if (name, kind) != ("recurrent", "low_rank")]


def train_case(name: str, kind: str, in_parts: bool = False) -> list[float]:
    """theta_d after three steps of Adam, on the same batch in each process."""
    case = BY_NAME[name]
    base = case.model()
    if in_parts:
        import deepspeed

        if kind == "early":  # as transformers loads a model after TrainingArguments with ZeRO-3
            deepspeed.zero.Init(module=base, config_dict_or_path=CONFIG)
    model = get_peft_model(base, settings(**PART_KINDS[kind])).train()
    vector, engine = theta_d(model), model
    optimizer = torch.optim.Adam([vector], lr=0.02)
    if in_parts:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    for _ in range(3):
        value = loss(engine, case.batch()).float()
        if in_parts:
            engine.backward(value)
            engine.step()
        else:
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    if not in_parts:
        return vector.tolist()
    with deepspeed.zero.GatheredParameters([vector]):
        return vector.tolist()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = {}
    for sharding in SHARDINGS:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            context = multiprocessing.get_context("fork")  # so that the imports run once
            port = free_port()
            workers = [context.Process(target=work, args=(p, sharding, port, folder)) for p in range(2)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            if any(worker.exitcode for worker in workers):
                sys.exit(f"{sharding} failed")
            results[sharding] = json.loads(Path(folder, "results.json").read_text())
    print("RESULTS " + json.dumps(results))
