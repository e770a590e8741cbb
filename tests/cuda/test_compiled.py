"""What the interpreter runs is compiled, too: for an H100 at LLaMA's shapes, without one."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
def test_every_kernel_has_machine_code() -> None:
    """In a process of its own: in this one Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "tests.cuda.compiled"]
    made = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    lines = made.stdout.splitlines()
    assert len(lines) == 13
    assert all(int(line.split()[-1]) > 1000 for line in lines)
