"""The local runner: several runs at once, failures, interruption; the suite itself is stubbed."""

import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from qtale_lightning.sweeps import local
from qtale_lightning.sweeps.local import device_slots, run_locally
from qtale_lightning.sweeps.processes import Processes
from qtale_lightning.sweeps.trial import Trial


def trials(to: Path, *values: int) -> list[Trial]:
    return [Trial.parse([f"--to={to}", "fit", "--", f"--a={value}"]) for value in values]


class Suite:
    """Stands for `Processes.run`: notes who ran with which device, and how many at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.devices: list[dict[str, str]] = []
        self.at_once = self.most = 0
        self.fails: set[str] = set()
        self.lock = threading.Lock()
        monkeypatch.setattr(Processes, "run", lambda _, *args: self.run(*args))

    def run(self, command: Sequence[str], environment: Mapping[str, str], log: Path, lock: int | None) -> int:
        with self.lock:
            self.ran.append(command[-1])
            self.devices.append(dict(environment))
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        time.sleep(0.05)  # so that runs that may overlap do
        with self.lock:
            self.at_once -= 1
        return 2 if command[-1] in self.fails else 0


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Suite:
    return Suite(monkeypatch)


def test_one_after_the_other_without_more_devices(suite: Suite, tmp_path: Path) -> None:
    assert run_locally(trials(tmp_path, 1, 2, 3), [{}]) == []
    assert (suite.ran, suite.most) == (["--a=1", "--a=2", "--a=3"], 1)


def test_every_device_has_one_run_at_a_time(suite: Suite, tmp_path: Path) -> None:
    slots = [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert run_locally(trials(tmp_path, *range(6)), slots) == []
    assert suite.most == 2
    assert sorted(suite.ran) == [f"--a={i}" for i in range(6)]
    assert {device["CUDA_VISIBLE_DEVICES"] for device in suite.devices} == {"0", "1"}


def test_a_failure_stops_nothing_and_is_tried_again(suite: Suite, tmp_path: Path) -> None:
    suite.fails = {"--a=1"}
    failed = run_locally(trials(tmp_path, 1, 2), [{}])
    assert [trial.parameters for trial in failed] == [{"a": "1"}]
    suite.fails, suite.ran = set(), []
    assert run_locally(trials(tmp_path, 1, 2), [{}]) == []
    assert suite.ran == ["--a=1"]


def test_ctrl_c_keeps_what_is_done_and_starts_no_other(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(jobs: Any) -> Any:
        for count, job in enumerate(as_completed(jobs)):
            yield job
            if count == 1:
                raise KeyboardInterrupt

    as_completed = local.as_completed
    monkeypatch.setattr(local, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_locally(trials(tmp_path, *range(8)), [{}])
    done = [trial for trial in trials(tmp_path, *range(8)) if trial.finished()]
    assert 2 <= len(done) <= 4  # the two, and those that began before the interruption was seen
    monkeypatch.setattr(local, "as_completed", as_completed)
    suite.ran = []
    assert run_locally(trials(tmp_path, *range(8)), [{}]) == []
    assert len(suite.ran) == 8 - len(done)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert device_slots(None) == [{}]
    assert device_slots(2) == [{"OMP_NUM_THREADS": "4"}] * 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in device_slots(None)] == ["0", "1"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in device_slots(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in device_slots(None)] == ["4", "6"]
    with pytest.raises(ValueError, match="--jobs 0"):
        device_slots(0)


def test_a_process_that_is_stopped_ends_by_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one: `sleep` in the interpreter's place."""
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    sleeper.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(sleeper))
    processes, statuses = Processes(), list[int]()
    thread = threading.Thread(
        target=lambda: statuses.append(processes.run(["fit"], {}, tmp_path / "log.txt"))
    )
    thread.start()
    deadline = time.monotonic() + 10
    while not processes._running and time.monotonic() < deadline:
        time.sleep(0.01)
    processes.stop()
    thread.join(10)
    assert statuses == [-signal.SIGTERM]
    assert processes.run(["fit"], {}, tmp_path / "log.txt") == -signal.SIGTERM  # no other begins
