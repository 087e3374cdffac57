"""The basis of a trajectory beside other ways to the same principal components.

    python recipes/speed/pca.py [--rounds 5] [--threads 2] [--entries 1000000] [--samples 60] [--d 40]

Samples of a random walk with drift whose steps shrink, float32, as a training leaves them. Ours reads them from their
files each time, at the default budget; torch.svd_lowrank and scikit-learn's PCA (its default solver, which at these
shapes is the randomised one, as in the published DLDR code; the exact one; and the covariance one, which scikit-learn
would take for few entries) have them in memory, and the others of torch have them centred too. The methods take turns.
The peak is that of the resident memory in a process of its own, beyond what it held before the call; the error is the
largest entry of P^T P - I, in float64; and the last column is the largest sine of an angle between the subspace of the
first ten columns and the exact one's.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.speed.record import keep
from subspace_peft import Trajectory


RESULTS = Path(__file__).parent / "results"


def record(folder: Path, entries: int, samples: int) -> None:
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
    """How far the resident memory of this process rises during one call, in bytes."""
    torch.set_num_threads(threads)
    run = METHODS[method](folder, d)
    torch.ones(64, 64) @ torch.ones(64, 64)  # what a first product allocates for good
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
    """Of the largest angle between two subspaces: |(I - Q Q^T) P|."""
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
    lines = [
        "| method | s | times ours | CPU s | peak, MB | error of PᵀP | angle to the exact ten |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in results.items():
        megabytes = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e6:.0f}"
        cells = [name, f"{r['s']:.2f}", f"{r['times_ours']:.1f}", f"{r['cpu_s']:.2f}", megabytes]
        cells += [f"{r['error']:.0e}", f"{r['angle']:.0e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--entries", type=int, default=10**6)
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--d", type=int, default=40)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path, default=RESULTS / "pca.json")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder), options.entries, options.samples)
        results = measure(Path(folder), options.d, options.rounds, options.methods)
    sizes = {"D": options.entries, "samples": options.samples, "d": options.d, "rounds": options.rounds}
    keep(options.output, {**sizes, "methods": results}, before, text(results))


if __name__ == "__main__":
    main()
