"""P theta_d and P^T g of every projection, beside a plain copy, the published way of computing Fastfood, and PEFT.

    python recipes/speed/projections.py [--rounds 1] [--threads 2] [--methods copy fastjl ...] [--sizes lenet ...]
    python recipes/speed/projections.py --report

All tensors of a network, or one tensor of as many entries, float32 on the CPU. The methods take turns, so that other
work on the machine slows all of them alike; the load is kept beside the medians. Keep the cores idle for times that
you want to quote. PEFT's layers are sized to make D entries too: Uni-LoRA those of A and B, VeRA (r = 256) and
FourierFT (d frequencies) one square increment. They and the baseline run through autograd; for our projections the
time through autograd is measured as well.
"""

import functools
import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import FourierFTConfig, UniLoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.measurement import positive
from recipes.lab.results import read_measurement
from recipes.speed.butterfly import ButterflyFastfood
from recipes.speed.comparison import plot, summary, text
from recipes.speed.record import FOLDER, measured, parser
from subspace_peft.projections import PROJECTIONS, TensorRows


def linears(*widths: int) -> list[int]:
    """Entries of the weights and biases of linear layers."""
    return [n for a, b in itertools.pairwise(widths) for n in (a * b, b)]


# name: (d, entries of the tensors, rounds)
SIZES = {
    "lenet": (170, [150, 6, 2400, 16, *linears(256, 120, 84, 10)], 100),
    "fc": (4000, linears(3072, 270, 270, 270, 270, 10), 30),
    "fc_lenet": (5000, [3072 * 4704, 4704, 1176 * 1600, 1600, *linears(400, 120, 84, 10)], 9),
    "vit": (1024, [*[384 * 384] * 24, *[384 * 1536] * 12], 9),
}
SIZES |= {f"{name} as one tensor": (d, [sum(n)], rounds) for name, (d, n, rounds) in list(SIZES.items())[:3]}
DENSE = 2**28
"""Entries of P from which dense and basis take minutes and are measured only if `--methods` names them."""

Pass = Callable[[], object]


class Contender:
    """One method at one size: `forward` makes D entries of theta_d, `backward` d entries of D."""

    def __init__(self, forward: Pass, backward: Pass, state: list[Tensor], both: Pass | None = None):
        self.passes = {"apply": forward, "adjoint": backward} | ({"autograd": both} if both else {})
        self.wall = {name: [] for name in self.passes}
        self.cpu = {name: [] for name in self.passes}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state}
        self.bytes = sum(storages.values())

    def round(self) -> None:
        for name, run in self.passes.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            self.wall[name].append(time.perf_counter() - wall)
            self.cpu[name].append(time.process_time() - cpu)

    def forget(self) -> None:
        """Drop the times of the first round, which draws and allocates."""
        for times in (*self.wall.values(), *self.cpu.values()):
            times.clear()

    def result(self, D: int) -> dict:
        ms = {name: 1e3 * statistics.median(times) for name, times in self.wall.items()}
        total = [a + b for a, b in zip(self.wall["apply"], self.wall["adjoint"], strict=True)]
        cpu = [a + b for a, b in zip(self.cpu["apply"], self.cpu["adjoint"], strict=True)]
        return {
            "ms": round(1e3 * statistics.median(total), 3),
            "best_ms": round(1e3 * min(total), 3),
            "cpu_ms": round(1e3 * statistics.median(cpu), 3),
            **{f"{name}_ms": round(value, 3) for name, value in ms.items()},
            "state_bytes_per_entry": round(self.bytes / D, 2),
        }


def differentiated(make: Callable[[], list[Tensor]], grads: list[Tensor], state: list[Tensor]) -> Contender:
    """A method that autograd differentiates."""
    made = []

    def forward():
        made[:] = make()

    return Contender(forward, lambda: torch.autograd.backward(made, grads), state)


def tensors(nested) -> list[Tensor]:
    return [nested] if isinstance(nested, Tensor) else [t for item in nested for t in tensors(item)]


def copy(d: int, entries: list[int], grads: list[Tensor]) -> Contender:
    source = [torch.randn(n) for n in entries]
    return Contender(lambda: [t.clone() for t in source], lambda: [g.clone() for g in grads], [])


def butterfly(d: int, entries: list[int], grads: list[Tensor]) -> Contender:
    theta_d, maps = torch.randn(d, requires_grad=True), [ButterflyFastfood(n, d) for n in entries]
    return differentiated(lambda: [p(theta_d) for p in maps], grads, [t for p in maps for t in p.state()])


def rows(name: str, d: int, entries: list[int]) -> list[TensorRows]:
    """The rows of P of each tensor."""
    made, offset, D = [], 0, sum(entries)
    for k, n in enumerate(entries):
        if name == "identity":
            made.append(TensorRows(f"{k}", n, D, offset=offset))
        elif name == "coordinate":
            column, end = d * offset // D, d * (offset + n) // D  # d positions in all
            positions = torch.arange(end - column) * (n // max(end - column, 1))
            made.append(TensorRows(f"{k}", n, d, column=column, given=positions))
        else:
            made.append(TensorRows(f"{k}", n, d, given=torch.randn(n, d) if name == "basis" else None))
        offset += n
    return made


def ours(name: str, d: int, entries: list[int], grads: list[Tensor]) -> Contender:
    maps = [PROJECTIONS[name](each) for each in rows(name, d, entries)]
    theta_d = nn.Parameter(torch.randn(maps[0].rows.d))
    plain = theta_d.detach()
    cache = type(maps[0]).together(maps)
    joints = list(getattr(cache, "joints", ()))
    joined = {member.rows.name for joint in joints for member in joint.members}
    alone = [p for p in maps if p.rows.name not in joined]
    grad_of = {p.rows.name: g for p, g in zip(maps, grads, strict=True)}
    zeros = [[torch.zeros(pad) for _, pad in joint.extents] for joint in joints]

    def forward():
        return [p.apply(plain) for p in (*joints, *alone)]

    def backward():
        total = torch.zeros_like(plain)
        for joint, pads in zip(joints, zeros, strict=True):
            pairs = zip((grad_of[member.rows.name] for member in joint.members), pads, strict=True)
            total += joint.adjoint(torch.cat(list(itertools.chain(*pairs))))
        for p in alone:
            total += p.adjoint(grad_of[p.rows.name])

    def both():
        z = cache.normalised(theta_d, 1.0) if joints else theta_d
        torch.autograd.backward([p(z) for p in maps], grads)
        theta_d.grad.zero_()
        with torch.no_grad():
            theta_d.add_(1e-3)  # as an optimizer does, so that P z is computed anew

    state = tensors([joint.state(plain) for joint in joints] + [p.state(plain.device) for p in maps])
    return Contender(forward, backward, state, both)


def peft(name: str, d: int, entries: list[int], grads: list[Tensor]) -> Contender:
    D = sum(entries)
    if name == "unilora":
        width, rank = 1024, max(1, round(D / 2048))
        config = UniLoraConfig(r=rank, theta_d_length=d, target_modules=["0"])
    else:
        width = round(D**0.5)
        frequencies = {"n_frequency": d, "target_modules": ["0"]}
        config = VeraConfig(r=256, target_modules=["0"]) if name == "vera" else FourierFTConfig(**frequencies)
    model = get_peft_model(nn.Sequential(nn.Linear(width, width, bias=False)), config)
    layer = model.base_model.model[0]
    if name == "unilora":
        make = functools.partial(layer._get_lora_matrices, "default")
    else:
        make = lambda: [layer.get_delta_weight("default")]  # noqa: E731
    state = [b for key, b in model.named_buffers() if "base_layer" not in key]
    return differentiated(make, [torch.randn_like(t) for t in make()], state)


METHODS: dict[str, Callable[..., Contender]] = {
    "copy": copy,
    "butterfly fastfood": butterfly,
    **{name: functools.partial(ours, name) for name in PROJECTIONS},
    **{f"peft {name}": functools.partial(peft, name) for name in ("unilora", "vera", "fourierft")},
}


def measure(size: str, methods: list[str] | None, rounds: float) -> dict:
    d, entries, usual = SIZES[size]
    D = sum(entries)
    torch.manual_seed(0)
    grads = [torch.randn(n) for n in entries]
    feasible = [m for m in METHODS if m not in ("dense", "basis") or D * d < DENSE]
    contenders, setup = {}, {}
    for name in methods or feasible:
        start = time.perf_counter()
        contenders[name] = METHODS[name](d, entries, grads)
        setup[name] = round(time.perf_counter() - start, 3)
        contenders[name].round()
        contenders[name].forget()
    gc.collect()
    gc.disable()  # a collection would slow the method that runs when it comes
    for _ in tqdm(range(max(1, round(usual * rounds))), desc=size, unit="round"):
        for contender in contenders.values():
            contender.round()
    gc.enable()
    results = {name: {**c.result(D), "setup_s": setup[name]} for name, c in contenders.items()}
    compare(results)
    return {"D": D, "d": d, "load": os.getloadavg(), "methods": results}


def compare(results: dict[str, dict]) -> None:
    """Adds to each method its time beside that of the copy and of the butterfly, where these were measured."""
    copy, baseline = results.get("copy"), results.get("butterfly fastfood")
    for result in results.values():
        if copy:
            result["of_copy"] = round(result["ms"] / copy["ms"], 2)
            result["cpu_of_copy"] = round(result["cpu_ms"] / copy["cpu_ms"], 2)
        if baseline:
            result["times_faster_than_butterfly"] = round(baseline["ms"] / result["ms"], 1)
            result["cpu_times_faster_than_butterfly"] = round(baseline["cpu_ms"] / result["cpu_ms"], 1)


def tables() -> dict[str, str]:
    """What the committed results say of all sizes, for the README."""
    return {"": summary(read_measurement(FOLDER / "projections.jsonl")["sizes"])}


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=positive, default=1.0, help="times the usual number")
    options.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    options.add_argument(
        "--methods", nargs="+", choices=METHODS, help="default: all; dense and basis only where P is small"
    )
    chosen = options.parse_args(arguments)
    record = measured(
        "projections",
        chosen,
        lambda: {"sizes": {size: measure(size, chosen.methods, chosen.rounds) for size in chosen.sizes}},
    )
    for size, result in record["sizes"].items():
        print(text(size, result))
    figure = plot(record["sizes"], chosen.output / "plots" / "projections.png")
    print(f"\nfigure: {figure}")


if __name__ == "__main__":
    command.run(main)
