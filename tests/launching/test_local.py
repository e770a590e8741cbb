"""The launcher of this machine: several jobs at once, failures, interruption; the suite itself is stubbed."""

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from qtale_lightning.launching import Job, Local, launcher
from qtale_lightning.launching.local import device_slots
from qtale_lightning.launching.processes import Processes

Noting = Callable[..., Job]
Ended = dict[str, int | str]


class Suite:
    """Stands for `Processes.run`: notes who ran with which device, and how many at once.

    Attributes:
        fails: Names of jobs whose commands fail.
        interrupts: After so many commands, Ctrl-C.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.devices: list[dict[str, str]] = []
        self.at_once = self.most = 0
        self.fails: set[str] = set()
        self.interrupts: int | None = None
        self.lock = threading.Lock()
        monkeypatch.setattr(Processes, "run", lambda _, *args, environment: self.run(*args, environment))

    def run(self, command: Sequence[str], log: Path, lock: int | None, environment: Mapping[str, str]) -> int:
        with self.lock:
            self.ran.append(" ".join(command))
            self.devices.append(dict(environment))
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            if len(self.ran) == self.interrupts:
                os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)  # so that runs that may overlap do
        with self.lock:
            self.at_once -= 1
        return 2 if command[0] in self.fails else 0


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Suite:
    return Suite(monkeypatch)


def test_one_after_the_other_without_more_devices(suite: Suite, job: Noting, ended: Ended) -> None:
    Local().run([job("a", 2), job("b"), job("c")])
    assert (suite.ran, suite.most) == (["a 0", "a 1", "b 0", "c 0"], 1)
    assert ended == {"a": 0, "b": 0, "c": 0}


def test_every_device_has_one_job_at_a_time(suite: Suite, job: Noting, ended: Ended) -> None:
    slots = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    Local(slots).run([job(name) for name in "abcdef"])
    assert suite.most == 2
    assert sorted(suite.ran) == [f"{name} 0" for name in "abcdef"]
    assert {device["CUDA_VISIBLE_DEVICES"] for device in suite.devices} == {"0", "1"}


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_failure_stops_no_other_job(suite: Suite, job: Noting, ended: Ended, at_once: int) -> None:
    suite.fails = {"a"}
    Local([{}] * at_once).run([job("a", 2), job("b", 2)])
    assert ended == {"a": 2, "b": 0}
    assert sorted(suite.ran) == ["a 0", "b 0", "b 1"]


@pytest.mark.parametrize("at_once", [1, 2])
def test_ctrl_c_keeps_what_is_done_and_starts_no_other(
    suite: Suite, job: Noting, ended: Ended, at_once: int
) -> None:
    suite.interrupts = 3
    with pytest.raises(KeyboardInterrupt):
        Local([{}] * at_once).run([job(name) for name in "abcdefgh"])
    assert 3 <= len(suite.ran) <= 3 + at_once
    assert list(ended.values()).count(0) >= 2
    assert len(ended) == len(suite.ran)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert device_slots(None) == [{}]
    assert device_slots(2) == [{"OMP_NUM_THREADS": "4"}] * 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in device_slots(None)] == ["0", "1"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in device_slots(3)] == ["0", "1", "0"]
    assert device_slots(1) == [{}], "a single job has all of them"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in device_slots(None)] == ["4", "6"]


def test_no_jobs_at_a_time_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--jobs 0"):
        launcher("local", 0, tmp_path)
