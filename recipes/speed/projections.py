"""P theta_d and P^T g of every projection, beside a plain copy, the published way of computing Fastfood, and PEFT.

    python recipes/speed/projections.py [--rounds 1] [--threads 2] [--methods copy fastjl ...] [--sizes lenet ...]

All tensors of a network, or one tensor of as many entries, float32 on the CPU. The methods take
turns, so that whatever else the machine does falls on all of them alike; the load is written beside the medians. Keep
the cores idle for numbers that count. PEFT's layers are sized to make D entries too: Uni-LoRA those of A and B,
VeRA (r = 256) and FourierFT (d frequencies) one square increment; they and the baseline run through autograd, and for
ours the time through autograd is given as well.
"""

import argparse
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

from recipes.lab import environment
from recipes.speed.butterfly import ButterflyFastfood
from subspace_peft.projections import PROJECTIONS, TensorRows


RESULTS = Path(__file__).parent / "results"


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
DENSE = 2**28  # entries of P from which it takes minutes; then only by name

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


def ours(name: str, d: int, entries: list[int], grads: list[Tensor]) -> Contender:
    maps, offset = [], 0
    for k, n in enumerate(entries):
        if name == "identity":
            block = TensorRows(f"{k}", n, sum(entries), offset=offset)
        elif name == "coordinate":
            share = d * (offset + n) // sum(entries) - d * offset // sum(entries)  # d positions in all
            positions = torch.arange(share) * (n // max(share, 1))
            block = TensorRows(f"{k}", n, d, column=d * offset // sum(entries), given=positions)
        else:
            block = TensorRows(f"{k}", n, d, given=torch.randn(n, d) if name == "basis" else None)
        maps.append(PROJECTIONS[name](block))
        offset += n
    theta_d = nn.Parameter(torch.randn(maps[0].rows.d))
    plain = theta_d.detach()
    pieces = type(maps[0]).together(maps)
    joints = list(getattr(pieces, "joints", ()))
    of = {p.rows.name: g for p, g in zip(maps, grads, strict=True)}
    joined = {member.rows.name for joint in joints for member in joint.members}
    alone = [p for p in maps if p.rows.name not in joined]
    zeros = [[torch.zeros(pad) for _, pad in joint.extents] for joint in joints]

    def forward():
        return [p.apply(plain) for p in (*joints, *alone)]

    def backward():
        total = torch.zeros_like(plain)
        for joint, pads in zip(joints, zeros, strict=True):
            padded = [
                part for member, pad in zip(joint.members, pads, strict=True) for part in (of[member.rows.name], pad)
            ]
            total += joint.adjoint(torch.cat(padded))
        for p in alone:
            total += p.adjoint(of[p.rows.name])

    def both():
        z = pieces.normalised(theta_d, 1.0) if joints else theta_d
        torch.autograd.backward([p(z) for p in maps], grads)
        theta_d.grad.zero_()
        with torch.no_grad():
            theta_d.add_(1e-3)  # as an optimiser: what is kept is made anew

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
        for times in (*contenders[name].wall.values(), *contenders[name].cpu.values()):
            times.clear()
    gc.collect()
    gc.disable()  # a collection would fall on whoever runs when it comes
    for _ in tqdm(range(max(1, round(usual * rounds))), desc=size, unit="round"):
        for contender in contenders.values():
            contender.round()
    gc.enable()
    results = {name: {**c.result(D), "setup_s": setup[name]} for name, c in contenders.items()}
    for result in results.values():
        if "copy" in results:
            result["of_copy"] = round(result["ms"] / results["copy"]["ms"], 2)
            result["cpu_of_copy"] = round(result["cpu_ms"] / results["copy"]["cpu_ms"], 2)
        if "butterfly fastfood" in results:
            baseline = results["butterfly fastfood"]
            result["times_faster_than_butterfly"] = round(baseline["ms"] / result["ms"], 1)
            result["cpu_times_faster_than_butterfly"] = round(baseline["cpu_ms"] / result["cpu_ms"], 1)
    return {"D": D, "d": d, "load": os.getloadavg(), "methods": results}


def text(size: str, result: dict) -> str:
    lines = [
        f"\n{size}: D = {result['D']:,}, d = {result['d']:,}; load {result['load'][0]:.1f}\n",
        "| method | ms | apply / adjoint | through autograd | CPU ms | of copy | than butterfly | bytes an entry |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in result["methods"].items():
        cells = [name, f"{r['ms']:.3g}", f"{r['apply_ms']:.3g} / {r['adjoint_ms']:.3g}"]
        cells += [f"{r['autograd_ms']:.3g}" if "autograd_ms" in r else "", f"{r['cpu_ms']:.3g}", r.get("of_copy", "")]
        cells += [r.get("times_faster_than_butterfly", ""), r["state_bytes_per_entry"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=float, default=1.0, help="times the usual number")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all, but dense and basis where small")
    parser.add_argument("--output", type=Path, default=RESULTS / "projections.json")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    record = {"sizes": {}}
    for size in options.sizes:
        record["sizes"][size] = measure(size, options.methods, options.rounds)
        print(text(size, record["sizes"][size]), flush=True)
    environment.write(options.output, record)
    print(f"\n{options.output}")


if __name__ == "__main__":
    main()
