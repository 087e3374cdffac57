"""The basis of a trajectory beside other ways to the same principal components.

    python recipes/speed/pca.py [--rounds 5] [--threads 2] [--entries 1000000] [--samples 60] [--d 40]
    python recipes/speed/pca.py --report

The trajectory is a random walk with drift whose steps shrink, float32 [samples, entries]. Ours reads it from its files
in each call, with the default memory budget. The others have it in memory, torch's centred too: torch.svd_lowrank,
torch.linalg.svd, and scikit-learn's PCA with its default solver, which for these shapes is the randomised one of the
published DLDR code, and with its exact one. The methods take turns.

- peak: how far the resident memory of a separate process rises during the call, in bytes
- error: the largest entry of P^T P - I, in float64
- angle: the sine of the largest angle between the first ten columns and those of torch.linalg.svd
"""

import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.lab import command
from recipes.lab.measurement import at_least
from recipes.lab.results import read_measurement
from recipes.reports.tables import markdown
from recipes.speed.record import FOLDER, measured, parser
from subspace_peft import Trajectory


def walk(folder: Path, entries: int, samples: int) -> None:
    """Records the trajectory."""
    torch.manual_seed(0)
    model, trajectory, drift = nn.Linear(entries, 1, bias=False), Trajectory(folder), torch.randn(1, entries)
    with torch.no_grad():
        for i in range(samples):
            trajectory.add(model)
            model.weight.add_(1e-3 * (drift + torch.randn(1, entries)) / (1 + i / 10))


def loaded(folder: Path) -> Tensor:
    """[samples, D], float32."""
    trajectory = Trajectory(folder)
    return torch.stack([trajectory.sample(i)["weight"].view(-1) for i in range(len(trajectory))])


def ours(folder: Path, d: int) -> Callable[[], Tensor]:
    return lambda: Trajectory(folder).basis(d)["weight"].view(-1, d)


def lowrank(folder: Path, d: int, niter: int) -> Callable[[], Tensor]:
    W = loaded(folder)
    W = (W - W.mean(0)).T
    return lambda: torch.svd_lowrank(W, q=d, niter=niter)[0]


def exact(folder: Path, d: int) -> Callable[[], Tensor]:
    W = loaded(folder)
    W = (W - W.mean(0)).T.contiguous()
    return lambda: torch.linalg.svd(W, full_matrices=False)[0][:, :d]


def scikit(folder: Path, d: int, solver: str) -> Callable[[], Tensor]:
    W = loaded(folder).numpy()
    return lambda: torch.from_numpy(np.ascontiguousarray(PCA(d, svd_solver=solver).fit(W).components_.T))


METHODS: dict[str, Callable[[Path, int], Callable[[], Tensor]]] = {
    "subspace_peft": ours,
    "torch.svd_lowrank, niter 2": lambda folder, d: lowrank(folder, d, 2),
    "torch.linalg.svd": exact,
    "scikit-learn PCA, auto": lambda folder, d: scikit(folder, d, "auto"),
    "scikit-learn PCA, full": lambda folder, d: scikit(folder, d, "full"),
}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak(method: str, folder: Path, d: int, threads: int, answer) -> None:
    """Answers how far the resident memory of this process rises during one call, in bytes."""
    torch.set_num_threads(threads)
    run = METHODS[method](folder, d)
    torch.ones(64, 64) @ torch.ones(64, 64)  # the first product allocates buffers that torch keeps
    before = highest = resident()
    done = threading.Event()

    def watch():
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    answer.put(highest - before)


def in_its_own_process(method: str, folder: Path, d: int) -> int | None:
    if not Path("/proc/self/statm").exists():
        return None
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=peak, args=(method, folder, d, torch.get_num_threads(), answer))
    process.start()
    process.join()
    return None if process.exitcode else answer.get()


def orthonormality_error(P: Tensor) -> float:
    gram = P.double().T @ P.double()
    return (gram - torch.eye(P.shape[1], dtype=torch.float64)).abs().max().item()


def sine(P: Tensor, Q: Tensor) -> float:
    """The sine of the largest angle between two subspaces: |(I - Q Q^T) P|_2."""
    P, Q = torch.linalg.qr(P.double())[0], torch.linalg.qr(Q.double())[0]
    return torch.linalg.matrix_norm(P - Q @ (Q.T @ P), 2).item()


def measure(folder: Path, d: int, rounds: int, names: list[str]) -> dict[str, dict]:
    runs = {name: METHODS[name](folder, d) for name in names}
    reference = exact(folder, d)()[:, :10]
    results = {}
    for name, run in runs.items():
        P = run()
        results[name] = {"error": orthonormality_error(P), "angle": sine(P[:, :10], reference)}
        del P
    seconds, cpu = {name: [] for name in names}, {name: [] for name in names}
    for _ in tqdm(range(rounds), desc="pca", unit="round"):
        for name, run in runs.items():
            wall, busy = time.perf_counter(), time.process_time()
            run()
            seconds[name].append(time.perf_counter() - wall)
            cpu[name].append(time.process_time() - busy)
    del runs
    for name in names:
        results[name] |= {"s": statistics.median(seconds[name]), "best_s": min(seconds[name])}
        results[name]["cpu_s"] = statistics.median(cpu[name])
        results[name]["times_ours"] = results[name]["s"] / results.get("subspace_peft", results[name])["s"]
        results[name]["peak_bytes"] = in_its_own_process(name, folder, d)
    return results


def text(results: dict[str, dict]) -> str:
    rows = []
    for name, r in results.items():
        megabytes = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:.0f}"
        cells = [name, f"{r['s']:.2f}", f"{r['times_ours']:.1f}", f"{r['cpu_s']:.2f}", megabytes]
        rows.append([*cells, f"{r['error']:.0e}", f"{r['angle']:.0e}"])
    header = ["method", "s", "times ours", "CPU s", "peak, MB", "error of PᵀP", "angle to the exact ten"]
    return "\n".join(markdown(header, rows))


def tables() -> dict[str, str]:
    """What the committed results say, for the README."""
    return {"": text(read_measurement(FOLDER / "pca.jsonl")["methods"])}


def main(arguments: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=at_least(1), default=5)
    options.add_argument("--entries", type=at_least(1), default=10**6)
    options.add_argument("--samples", type=at_least(2), default=60)
    options.add_argument("--d", type=at_least(1), default=40)
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    chosen = options.parse_args(arguments)
    most = min(chosen.entries, chosen.samples - 1)
    if chosen.d > most:
        raise ValueError(f"`--d` must be at most the {most} components of the trajectory, got {chosen.d}.")
    sizes = {"D": chosen.entries, "samples": chosen.samples, "d": chosen.d, "rounds": chosen.rounds}

    def compare() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            walk(Path(folder), chosen.entries, chosen.samples)
            return sizes | {"methods": measure(Path(folder), chosen.d, chosen.rounds, chosen.methods)}

    print(text(measured("pca", chosen, compare)["methods"]))


if __name__ == "__main__":
    command.run(main)
