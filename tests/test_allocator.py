"""What `keep_freed_memory` changes, seen from outside: in a process of its own, since it can't be undone."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, torch
from qtale_lightning.allocator import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def kept():
    before = resident()
    tensor = torch.ones(2**26)
    del tensor
    return (resident() - before) / 2**28

by_default = kept()
assert keep_freed_memory()
print(by_default, kept())
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings, on Linux")
def test_freed_memory_stays_in_the_process() -> None:
    """The share of a freed tensor that is still in memory, before and after."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    by_default, kept = map(float, done.stdout.split())
    assert by_default < 0.1
    assert kept > 0.9
