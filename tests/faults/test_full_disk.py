"""A disk that fills up at any stage: one message with the path, what was good is kept, and the same command goes on."""

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Count
from tests.faults.starter import Starter
from tests.faults.test_killed import RUN, outcome

ROOM = 256
"""MiB: more than a run needs."""


def mount(folder: Path, *options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder that is a file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or not mount(folder, f"size={ROOM}m"):
        pytest.skip("a small file system needs the right to mount one")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_costs_nothing_but_the_time(
    disk: Path,
    starter: Starter,
    small: Callable[[Path], list[str]],
    trials: Callable[[int], int],
    count: Count,
) -> None:
    ended = starter.run(small(disk))
    assert ended.status == 0, ended.output
    expected = outcome(disk / RUN)
    used = sum(file.stat().st_blocks * 512 for file in disk.rglob("*"))
    chance = random.Random("full disk")
    wanted, filled, lost = trials(1), 0, 0
    while filled < wanted:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
        assert mount(disk, f"size={int(chance.uniform(0.02, 0.95) * used)}")
        ended = starter.run(small(disk))
        if ended.status == 0:  # the finished run is smaller than it was on its way
            continue
        filled += 1
        assert "Traceback" not in ended.output, ended.output
        (message,) = [line for line in ended.output.splitlines() if line.startswith("error:")]
        assert "no space is left on the disk" in message
        assert str(disk) in message
        assert mount(disk, "remount", f"size={ROOM}m")
        ended = starter.run(small(disk))
        assert ended.status == 0, ended.output
        lost += outcome(disk / RUN) != expected
    count("full disk at any stage", filled, lost)
    assert lost == 0


@pytest.mark.slow
def test_a_small_temporary_folder_is_enough(
    disk: Path,
    starter: Starter,
    small: Callable[[Path], list[str]],
    tmp_path: Path,
    count: Count,
) -> None:
    """Everything is written beside its target."""
    assert mount(disk, "remount", "size=64k")
    ended = starter.run(small(tmp_path / "out"), TMPDIR=str(disk))
    count("temporary folder of 64 KiB", 1, int(ended.status != 0))
    assert ended.status == 0, ended.output
    assert not list(disk.iterdir())
