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

import torch

from qtale_lightning.files import user_cache
from qtale_lightning.precision import native_bfloat16

log = logging.getLogger(__name__)

SWITCH = "QTALE_CPU_KERNELS"
"""Environment variable: 0 leaves everything to PyTorch's own operations."""

SOURCES = Path(__file__).parent
# What the sources use; named one by one, so that a library in a shared home folder runs on every such processor.
PROCESSOR = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16")
FLAGS = (
    "-O3",
    "-ffp-contract=off",  # a product and a sum round as PyTorch's do, unless the code says otherwise
    "-std=c++20",
    "-shared",
    "-fPIC",
    "-fopenmp",
    *(f"-m{feature}" for feature in PROCESSOR),
    "-DCPU_CAPABILITY_AVX512",
    "-DCPU_CAPABILITY=AVX512",
    "-DAT_PARALLEL_OPENMP=1",
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
)
SECONDS = 300  # a build takes about 10


@cache
def available() -> bool:
    """Whether the operations can be called; the first call builds or loads them, and logs why not where it can't."""
    if reason := unavailable():
        log.info("PyTorch's own CPU operations are used: %s", reason)
        return False
    try:
        torch.ops.load_library(_library())
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("CPU operations weren't built, PyTorch's own are used (slower): %s", _reason(error))
        return False
    return True


def unavailable() -> str | None:
    """Why ours aren't built here; None where they can be."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    if not sys.platform.startswith("linux"):
        return "ours are built on Linux"
    if not (torch.cpu._is_avx512_bf16_supported() and native_bfloat16()):
        return "ours need a processor with AVX-512 and its bfloat16 instructions"
    if not shutil.which(_compiler()[0]):
        return f"ours need a C++ compiler: install g++, or name one by CXX (not found: {_compiler()[0]})"
    return None


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _library() -> Path:
    """The compiled library, built where it is missing: one for each version of the sources, PyTorch and flags."""
    files = sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")])
    state = [file.read_bytes() for file in files]
    state += [repr((torch.__version__, sys.version_info[:2], _compiler(), FLAGS)).encode()]
    name = hashlib.sha256(b"\0".join(state)).hexdigest()[:16]
    library = user_cache() / f"cpu-{name}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Processes that start together build it each for itself; the last one to rename wins, and all are the same.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            log.info("building CPU operations, once: about 10 seconds")
            built = Path(folder) / library.name
            _compile(built)
            built.replace(library)
    return library


def _compile(output: Path) -> None:
    """Raises: OSError, subprocess.SubprocessError: the compiler is missing or fails."""
    torch_folder = Path(torch.__file__).parent
    include, libraries = torch_folder / "include", torch_folder / "lib"
    headers = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    command = [*_compiler(), *FLAGS, *headers, str(SOURCES / "library.cpp"), "-o", str(output)]
    command += [f"-L{libraries}", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)


def _reason(error: Exception) -> str:
    """The compiler's first error, or the exception's words."""
    lines = [line for line in (getattr(error, "stderr", None) or "").splitlines() if "error" in line.lower()]
    return lines[0] if lines else str(error)
