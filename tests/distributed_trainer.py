"""The program that test_subspace_trainer.py starts in two processes: line searches on parts of the same batch."""

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from subspace_peft import SubspaceTrainer
from subspace_peft.adapter.full_space import full_space
from subspace_peft.optim import PBFGS, ClassGradientNewton, PPlusBFGS, repeatable
from tests.cases import settings, theta_d


WOLFE = {"lr": 1.0, "max_iter": 3, "line_search_fn": "strong_wolfe"}
STEPS, ROWS = 3, 16


class Rows(Dataset):
    """Sixteen points in three classes."""

    def __len__(self):
        return ROWS

    def __getitem__(self, i):
        x = torch.randn(6, generator=torch.Generator().manual_seed(i))
        return {"x": x, "labels": x[:3].argmax()}


class Net(nn.Module):
    """A classifier, optionally with dropout and batch norm; `calls` records which forward passes had a graph."""

    def __init__(self, dropout: float = 0.0, norm: bool = False):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.calls: list[bool] = []

    def forward(self, x, labels=None):
        self.calls.append(torch.is_grad_enabled())
        logits = self.last(self.dropout(torch.tanh(self.norm(self.first(x)))))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def net(**options) -> nn.Module:
    torch.manual_seed(0)
    model = Net(**options)
    D = sum(p.numel() for p in model.parameters())
    basis = torch.linalg.qr(torch.randn(D, 7, generator=torch.Generator().manual_seed(0))).Q
    sizes = [p.numel() for p in model.parameters()]
    columns = {
        name: part.reshape(*p.shape, 7)
        for (name, p), part in zip(model.named_parameters(), basis.split(sizes), strict=True)
    }
    return get_peft_model(model, settings(projection="basis", basis=columns, normalization="columns"))


def arguments(folder, steps=STEPS, batch=ROWS, **changes) -> TrainingArguments:
    options = {"save_strategy": "no", "logging_steps": 1, "lr_scheduler_type": "constant", **changes}
    return TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch, report_to=[], disable_tqdm=True,
        use_cpu=True, seed=0, **options,
    )  # fmt: skip


def trainer(model, args, optimizer: Callable | None = None, cls=SubspaceTrainer, **kwargs) -> Trainer:
    """A trainer; `optimizer` is called with theta_d, and its result passed as `optimizers=`."""
    if optimizer is not None:
        kwargs["optimizers"] = (optimizer([theta_d(model)]), None)
    return cls(model=model, args=args, train_dataset=Rows(), **kwargs)


def logged(run: Trainer, key: str = "loss") -> list[float]:
    return [float(entry[key]) for entry in run.state.log_history if key in entry]


def calls(model) -> list[bool]:
    return model.get_base_model().calls


def pplus_bfgs(model: nn.Module) -> torch.optim.Optimizer:
    weights, lift = full_space(model)
    return PPlusBFGS([theta_d(model)], weights, lift, lr=0.5)


OPTIMIZERS = {
    "pbfgs": lambda model: PBFGS([theta_d(model)]),
    "lbfgs": lambda model: torch.optim.LBFGS([theta_d(model)], **WOLFE),
    "pplus_bfgs": pplus_bfgs,
    "class_gradients": lambda model: ClassGradientNewton([theta_d(model)], lr=0.5),
}


def by_trainer(kind: str, processes: int = 1) -> dict:
    """Full-batch updates, of two micro-batches in each process where the optimiser can."""
    model = net()
    parts = 1 if kind == "class_gradients" else 2
    optimizers = (OPTIMIZERS[kind](model), None)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, batch=ROWS // parts // processes, gradient_accumulation_steps=parts)
        run = trainer(model, args, optimizers=optimizers)
        run.train()
    base = model.get_base_model()
    with torch.no_grad():
        weight = base.first.base_layer.weight.flatten().tolist()
    return {"theta_d": theta_d(model).tolist(), "weight": weight, "calls": calls(model), "losses": logged(run)}


def by_accelerate(process: int = 0, processes: int = 1) -> dict:
    """The same updates in a loop with accelerate."""
    accelerator = Accelerator(cpu=True)
    base = net()
    model, optimizer = accelerator.prepare(base, PBFGS([theta_d(base)]))
    rows = [Rows()[i] for i in range(process, ROWS, processes)]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    parts = [{key: values[half::2] for key, values in batch.items()} for half in range(2)]

    def closure():
        optimizer.zero_grad()
        losses = []
        for part in parts:
            with contextlib.nullcontext() if part is parts[-1] else accelerator.no_sync(model):
                losses.append(model(**part)["loss"] / len(parts))
                if torch.is_grad_enabled():
                    accelerator.backward(losses[-1])
        return sum(losses).detach()

    for _ in range(STEPS):
        optimizer.step(repeatable(closure, model))
    return {"theta_d": theta_d(base).tolist(), "calls": base.get_base_model().calls}


def work(process: int, processes: int, port: int) -> None:
    os.environ.update(RANK=str(process), LOCAL_RANK=str(process), WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    results = {kind: by_trainer(kind, processes) for kind in OPTIMIZERS}
    results["loop"] = by_accelerate(process, processes)
    gathered = [None] * processes
    torch.distributed.all_gather_object(gathered, results)
    if process == 0:
        print("RESULTS " + json.dumps(gathered))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # forked, so that the imports run once
    workers = [multiprocessing.get_context("fork").Process(target=work, args=(p, 2, port)) for p in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(max(abs(worker.exitcode) for worker in workers))
