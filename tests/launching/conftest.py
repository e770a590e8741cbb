"""Jobs that only note what they are asked, and something quicker in the interpreter's place."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qtale_lightning.launching import Command, Job, Steps

Noting = Callable[..., Job]


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """As a terminal would start the tests: a job in the background inherits that Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def ended() -> dict[str, int | str]:
    """How the jobs of a test ended: the last exit status, or "stopped"."""
    return {}


@pytest.fixture
def job(tmp_path: Path, ended: dict[str, int | str]) -> Noting:
    """``job(name, commands)``: commands with this name and their number, until one of them fails."""

    def make(name: str, commands: int = 1) -> Job:
        def steps() -> Steps:
            ended[name] = "stopped"
            for number in range(commands):
                status = yield Command((name, str(number)), tmp_path / name / "log.txt")
                if status:
                    break
            ended[name] = status

        return Job(tmp_path / name, "a test", steps)

    return make


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A shell script in the interpreter's place."""

    def put(script: str) -> None:
        file = tmp_path / "python"
        file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        file.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(file))

    return put
