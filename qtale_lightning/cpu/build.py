"""Compiles the C++ operations on first use, and keeps the library for later processes."""

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qtale_lightning.files import user_cache
from qtale_lightning.precision import INSTRUCTION_SETS, instruction_sets

log = logging.getLogger(__name__)

SWITCH = "QTALE_CPU_KERNELS"
"""Environment variable: 0 leaves everything to PyTorch's own operations."""

CHOICE = "QTALE_CPU_ISA"
"""Environment variable: which of the instruction sets that the processor has ours use, instead of the best one."""

SOURCES = Path(__file__).parent
FLAGS = (
    "-O3",
    "-ffp-contract=off",  # a product and a sum round as PyTorch's do, unless the code says otherwise
    "-std=c++20",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",  # libraries for several instruction sets, in one process, have nothing in common
    "-DAT_PARALLEL_OPENMP=1",
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
)
SECONDS = 300  # a build takes about 10


@cache
def available() -> bool:
    """Whether the operations can be called; the first call builds or loads them, and logs why not where it can't.

    Raises:
        ValueError: As :func:`instruction_set`.
    """
    if reason := unavailable():
        log.info("PyTorch's own CPU operations are used: %s", reason)
        return False
    try:
        operations()
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("CPU operations weren't built, PyTorch's own are used (slower): %s", _reason(error))
        return False
    return True


def unavailable() -> str | None:
    """Why ours aren't built here; None where they can be.

    Raises:
        ValueError: As :func:`instruction_set`.
    """
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    if not sys.platform.startswith("linux"):
        return "ours are built on Linux"
    if instruction_set() is None:
        return "ours need a processor with AVX2, AVX-512 or NEON"
    if not shutil.which(_compiler()[0]):
        return f"ours need a C++ compiler: install g++, or name one by CXX (not found: {_compiler()[0]})"
    return None


def instruction_set() -> str | None:
    """Which of :data:`INSTRUCTION_SETS` ours use here: the best one, or what :data:`CHOICE` says; None without any.

    Raises:
        ValueError: `CHOICE` says something unknown, or what the processor lacks or PyTorch is told to leave alone.
    """
    has, asked = instruction_sets(), os.environ.get(CHOICE, "").lower()
    if not asked:
        return has[0] if has else None
    if asked not in INSTRUCTION_SETS:
        raise ValueError(f"{CHOICE} is {asked}, but it is one of {', '.join(INSTRUCTION_SETS)}")
    if asked not in has:
        why = "this processor hasn't, or PyTorch is told to leave alone (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA)"
        raise ValueError(f"{CHOICE} is {asked}, which {why}; it has {', '.join(has) or 'none of them'}")
    return asked


@cache
def operations(of: str | None = None) -> Any:
    """The operations, as attributes, for an instruction set, or for that of this process.

    Raises:
        OSError, subprocess.SubprocessError: They can't be built or loaded.
    """
    chosen = of or instruction_set()
    assert chosen is not None
    torch.ops.load_library(_library(chosen))
    return getattr(torch.ops, f"qtale_{chosen}")


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _flags(instructions: str) -> list[str]:
    """Of the compiler; by feature, so that a library in a shared home folder runs on every processor that has these."""
    features = (
        () if instructions == "neon" else INSTRUCTION_SETS[instructions]
    )  # every such processor has NEON
    named = ["fma" if feature == "fma3" else feature.replace("_", "") for feature in features]
    return [*FLAGS, *(f"-m{feature}" for feature in named), f"-DQTALE_LIBRARY=qtale_{instructions}"]


def _library(instructions: str) -> Path:
    """The compiled library, built where it is missing: one for each version of the sources, PyTorch and flags."""
    files = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])
    state = [file.read_bytes() for file in files]
    state += [repr((torch.__version__, sys.version_info[:2], _compiler(), _flags(instructions))).encode()]
    name = hashlib.sha256(b"\0".join(state)).hexdigest()[:16]
    library = user_cache() / f"cpu-{instructions}-{name}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Processes that start together build it each for itself; the last one to rename wins, and all are the same.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            log.info("building CPU operations for %s, once: about 10 seconds", instructions)
            built = Path(folder) / library.name
            _compile(built, instructions)
            built.replace(library)
    return library


def _compile(output: Path, instructions: str) -> None:
    """Raises: OSError, subprocess.SubprocessError: the compiler is missing or fails."""
    torch_folder = Path(torch.__file__).parent
    include, libraries = torch_folder / "include", torch_folder / "lib"
    headers = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    command = [*_compiler(), *_flags(instructions), *headers, str(SOURCES / "library.cpp"), "-o", str(output)]
    command += [f"-L{libraries}", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)


def _reason(error: Exception) -> str:
    """The compiler's first error, or the exception's words."""
    lines = [line for line in (getattr(error, "stderr", None) or "").splitlines() if "error" in line.lower()]
    return lines[0] if lines else str(error)
