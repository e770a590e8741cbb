"""What this machine has of what the suite needs: packages, processor, devices, room, W&B and the hub.

Every check is bounded: the processor is measured for a second, and the hub is asked for :data:`PATIENCE` seconds.
"""

import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

PATIENCE = 5  # seconds that the hub has to answer
LITTLE, NONE = (
    5 * 2**30,
    2**27,
)  # bytes free on a disk: below the one there is a warning, below the other no room

Mark = Literal["ok", "warn", "missing"]


@dataclass(frozen=True)
class Finding:
    """How it stands with a thing, what was found, and what to do where that isn't enough.

    Attributes:
        mark: missing is what the suite, or the model that is asked for, can't do without.
    """

    mark: Mark
    thing: str
    found: str
    advice: str = ""


def in_words(value: float) -> str:
    """A number of bytes."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def machine(out: Path) -> Iterator[Finding]:
    """What is here, whatever is to be run; runs go to a folder."""
    yield from versions(Path(__file__).parent.parent / "requirements.txt")
    yield from processor()
    yield from devices()
    free = free_memory()
    yield Finding("ok" if free > 2**31 else "warn", "memory", f"{in_words(free)} free")
    yield disk("runs' folder", out, "--out (OUT=… of make)")
    yield disk("hub's cache", hub_cache(), "HF_HOME")
    yield disk("temporary folder", Path(tempfile.gettempdir()), "TMPDIR")
    yield operations()
    yield wandb()
    yield hub()


def versions(requirements: Path) -> Iterator[Finding]:
    """Python, and the packages that are pinned in a file, where that is at hand."""
    recent = sys.version_info >= (3, 11)
    yield Finding(
        "ok" if recent else "missing", "Python", platform.python_version(), "" if recent else "3.11"
    )
    text = requirements.read_text(encoding="utf-8") if requirements.is_file() else ""
    pins = re.findall(r"^([\w.-]+)(?:\[[^]]*\])?==([\w.]+)", text, flags=re.MULTILINE)
    for name, pinned in pins:
        version = installed(name)
        if version is None:
            yield Finding("missing", name, "not installed", f"`make setup`, or pip install {name}=={pinned}")
        elif version.split("+")[0] != pinned:
            yield Finding("warn", name, version, f"the suite is tested with {pinned}")
    shown = [f"{name} {installed(name)}" for name in ("torch", "transformers", "lightning")]
    yield Finding("ok", "packages", f"{', '.join(shown)}; {len(pins)} pinned ones looked for")
    yield Finding(
        "ok", "lm-eval", installed("lm-eval") or "not installed; the command lm-eval alone needs it"
    )


def installed(package: str) -> str | None:
    """A package's version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> Iterator[Finding]:
    """What it is, which instructions it has, and how fast it multiplies."""
    import torch

    from qtale_lightning.precision import training_precision

    has = {*cpu_info("flags").split(), *cpu_info("Features").split()}
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
    sets = ", ".join(name for name in known if name in has) or "instructions unknown"
    name = cpu_info("model name") or platform.processor() or platform.machine()
    used = torch.backends.cpu.get_cpu_capability()
    yield Finding(
        "ok", "processor", f"{name}, {torch.get_num_threads()} threads; {sets}; PyTorch uses {used}"
    )
    single, half = speed(torch.float32), speed(torch.bfloat16)
    found = f"{single:.0f} GFLOP/s in float32, {half:.0f} in bfloat16; training chooses {training_precision('cpu')}"
    yield Finding("ok", "products", found)


def cpu_info(key: str) -> str:
    """A field of Linux's description of the first processor; empty elsewhere."""
    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(rf"^{key}\s*: (.*)$", text, flags=re.MULTILINE)
    return found[1] if found else ""


def speed(dtype: "torch.dtype", seconds: float = 0.3) -> float:
    """GFLOP/s of the fastest product of square matrices that fits into a time."""
    import torch

    factor = torch.ones(512, 512, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        started = time.perf_counter()
        factor @ factor
        best = min(best, time.perf_counter() - started)
    return 2 * len(factor) ** 3 / best / 1e9


def devices() -> Iterator[Finding]:
    """GPUs and their free memory."""
    import torch

    count = torch.cuda.device_count()
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
        yield Finding("ok", f"GPU {index}", f"{name}, {in_words(free)} of {in_words(total)} free")
    if torch.backends.mps.is_available():
        yield Finding("ok", "GPU", "Apple's (mps)")
    elif not count and shutil.which("nvidia-smi"):
        build = f"does PyTorch's build ({torch.__version__}) fit the driver that is here?"
        yield Finding("warn", "GPU", "none that PyTorch can use", build)
    elif not count:
        yield Finding("ok", "GPU", "none: everything runs on the processor")


def free_memory() -> int:
    """Bytes of main memory that a process can have, within its control group."""
    import psutil

    free = psutil.virtual_memory().available
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdecimal():
        free = min(free, int(text) - int(used.read_text()))
    return max(0, free)


def disk(thing: str, folder: Path, option: str) -> Finding:
    """Room in a folder, which may still have to be made."""
    there, free = existing(folder), free_disk(folder)
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding("missing", thing, f"{folder} can't be written to", f"name another one by {option}")
    mark: Mark = "missing" if free < NONE else "warn" if free < LITTLE else "ok"
    advice = "" if mark == "ok" else f"free some, or name another one by {option}"
    return Finding(mark, thing, f"{folder}, {in_words(free)} free", advice)


def existing(folder: Path) -> Path:
    """A folder, or the closest one above it that is there."""
    absolute = folder.expanduser().absolute()
    return next(parent for parent in (absolute, *absolute.parents) if parent.is_dir())


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is or will be."""
    return shutil.disk_usage(existing(folder)).free


def operations() -> Finding:
    """The suite's own operations for processors, which are built on first use."""
    from qtale_lightning.cpu import build

    reason = build.unavailable()
    if reason is None and build.available():
        return Finding("ok", "CPU operations", f"built for {build.instruction_set()}")
    return Finding(
        "ok" if reason else "warn", "CPU operations", f"PyTorch's own: {reason or 'the build failed'}"
    )


def wandb() -> Finding:
    """W&B's key and mode; its server isn't asked."""
    from qtale_lightning.wandb_session import has_key

    version, mode = installed("wandb"), os.environ.get("WANDB_MODE")
    also = f"; WANDB_MODE is {mode}" if mode else ""
    try:
        key = has_key()
    except Exception as error:  # its failures have many types
        return Finding("warn", "W&B", f"{version}: {error}{also}", "`wandb login`, or --wandb offline")
    state = "a key: runs are uploaded" if key else "no key: runs are recorded offline, unless `wandb login`"
    return Finding("ok", "W&B", f"{version}, {state}{also}")


def hub_cache() -> Path:
    """Where the hub's files are kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


@cache
def hub() -> Finding:
    """The Hugging Face hub: whether it may be asked, answers in time, and knows the user."""
    from huggingface_hub import constants, get_token

    user = "logged in" if get_token() else "not logged in, which gated models need (`hf auth login`)"
    where = f"{constants.ENDPOINT}, {user}"
    if constants.is_offline_mode():
        return Finding("warn", "hub", f"{where}; HF_HUB_OFFLINE is set: its cache alone is read")
    if reason := silence(constants.ENDPOINT):
        return Finding("warn", "hub", f"{where}; no answer: {reason}", "what is in its cache can be used")
    return Finding("ok", "hub", f"{where}; it answers")


def silence(address: str) -> str | None:
    """Why a server doesn't answer; None where it does, whatever it says."""
    from qtale_lightning.compat.http import httpx

    try:
        httpx.head(address, timeout=PATIENCE)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None
