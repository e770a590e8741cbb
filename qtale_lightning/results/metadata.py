"""What a run records of itself: the commit, the versions and the hardware that made its results."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

from qtale_lightning.quantization.engines import ENGINES
from qtale_lightning.results.schema import Git, Run

PACKAGES = ("torch", "transformers", "lightning", "peft", "wandb", "datasets", "torchmetrics")


def run_metadata(model: str, method: str, data: str, seed: int, command: str, source: str) -> Run:
    """The `run` section: what ran, from which commit, with which versions, on which hardware.

    Args:
        model, method, data, seed, command: As they were given.
        source: Where the base model was taken from, with its commit.
    """
    return {
        "model": model,
        "source": source,
        "method": method,
        "data": data,
        "seed": seed,
        "git": git_state(Path(__file__).parent),
        "versions": package_versions(),
        "hardware": hardware(),
        "command": command,
    }


def git_state(folder: Path) -> Git | None:
    """The commit checked out in `folder`'s repository; None outside one or without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return None


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed ones among `PACKAGES` and engines', and whose operations the CPU runs."""
    from qtale_lightning import cpu  # here, so that reading a report doesn't wait for torch

    installed = {"python": platform.python_version()}
    quantizers = [package for engine in ENGINES.values() for package in engine.packages]
    for package in (*PACKAGES, *quantizers):
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    ours = f"ours, {cpu.instruction_set()}" if cpu.available() else "PyTorch's"
    return installed | {"CPU operations": ours}


def hardware() -> str:
    """The machine in words, such as "AMD EPYC 7763, 64 cores; 8 × NVIDIA A100-SXM4-80GB"."""
    import torch  # here, so that reading a report doesn't wait for it

    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    cpu = named.group(1) if named else platform.processor() or platform.machine()
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    gpus = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    return f"{cpu}, {os.cpu_count()} cores; {gpus or 'no GPU'}"
