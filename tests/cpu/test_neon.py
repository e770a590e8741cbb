"""The operations for ARM's NEON, compiled by a cross compiler and run in an emulator: tests/cpu/plain.cpp."""

import shutil
import subprocess
from pathlib import Path

import pytest

from qtale_lightning.cpu import build

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"  # Debian's g++-aarch64-linux-gnu and qemu-user
FLAGS = ("-O2", "-ffp-contract=off", "-std=c++20", "-fopenmp", "-static", "-Wall", "-Werror")


@pytest.mark.slow
def test_against_plain_loops(tmp_path: Path) -> None:
    for needed in (COMPILER, EMULATOR):
        if not shutil.which(needed):
            pytest.skip(f"{needed} isn't installed")
    program = tmp_path / "plain"
    source = Path(__file__).parent / "plain.cpp"
    subprocess.run([COMPILER, *FLAGS, f"-I{build.SOURCES}", str(source), "-o", str(program)], check=True)
    done = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "0 failures\n"
