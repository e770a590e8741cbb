"""What `keep_freed_memory` changes, seen from outside: in a process of its own, since it can't be undone."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, sys, torch
from qtale_lightning.allocator import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = resident()
tensor = torch.ones(2**26)
del tensor
print((resident() - before) / 2**28)
"""


def kept(argument: str) -> float:
    """The share of a freed tensor that is still in memory."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, argument], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings, on Linux")
def test_freed_memory_stays_in_the_process() -> None:
    assert kept("default") < 0.1
    assert kept("keep") > 0.9
