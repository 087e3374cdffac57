"""What a result was made with: versions, hardware and commit."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


PACKAGES = ("subspace_peft", "torch", "peft", "transformers", "accelerate", "datasets", "numpy")


def record() -> dict[str, Any]:
    return {"versions": versions(), "hardware": hardware(), "commit": commit()}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def hardware() -> dict[str, Any]:
    """The load is that of the last minute, this run included: seconds measured beside other work count for less."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 1),
    }


def commit() -> str | None:
    """The commit of the code, with "-dirty" where files differ from it, but for what recipes write."""
    try:
        written = [f":(exclude){files}" for files in ("recipes/*/plots/*", "recipes/*/*.jsonl", "*.md")]
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
        return _git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parents[2]), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
