"""Commands as processes: what they print is kept, and they end when they are told to."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qtale_lightning.launching.processes import Processes, ending_on_sigterm

StandIn = Callable[[str], None]


def test_a_process_writes_its_log_and_returns_its_status(tmp_path: Path, stand_in: StandIn) -> None:
    stand_in('echo "$@"; echo problem >&2; exit 3')
    with (tmp_path / "lock").open("w") as lock:
        log = tmp_path / "logs" / "log"
        assert Processes().run(["fit", "--out", "a folder"], log, lock.fileno()) == 3
    assert log.read_text(encoding="utf-8").splitlines() == [
        "$ python -m qtale_lightning fit --out 'a folder'",
        "-m qtale_lightning fit --out a folder",
        "problem",
    ]


def test_a_process_inherits_the_lock(tmp_path: Path, stand_in: StandIn) -> None:
    stand_in('echo "$QTALE_LOCK_FD"; echo held > /proc/self/fd/$QTALE_LOCK_FD')
    with (tmp_path / "lock").open("w+") as lock:
        assert Processes().run([], tmp_path / "log", lock.fileno()) == 0
        assert (tmp_path / "log").read_text(encoding="utf-8").splitlines()[1] == str(lock.fileno())
        assert (tmp_path / "lock").read_text(encoding="utf-8") == "held\n"


def test_variables_can_be_given_and_hidden(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in('echo "${HIDDEN-none} $GIVEN"')
    monkeypatch.setenv("HIDDEN", "seen")
    assert Processes().run([], tmp_path / "log", None, {"HIDDEN": None, "GIVEN": "1"}) == 0
    assert (tmp_path / "log").read_text(encoding="utf-8").splitlines()[1] == "none 1"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_launcher_stops_its_process(tmp_path: Path, stand_in: StandIn, number: int) -> None:
    """SIGTERM, as a scheduler sends it, and Ctrl-C."""
    stand_in("echo $$; exec sleep 60")
    log = tmp_path / "log"
    stopping = threading.Thread(target=_once_started, args=(log, number))
    stopping.start()
    with ending_on_sigterm(), pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        Processes().run([], log)
    stopping.join()
    assert isinstance(ended.value, KeyboardInterrupt) == (number == signal.SIGINT)
    if isinstance(ended.value, SystemExit):
        assert ended.value.code == 128 + signal.SIGTERM
    child = int(log.read_text(encoding="utf-8").splitlines()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def _once_started(log: Path, number: int) -> None:
    _wait(lambda: log.is_file() and len(log.read_text(encoding="utf-8").splitlines()) == 2)
    os.kill(os.getpid(), number)


def _wait(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_what_was_stopped_ends_by_sigterm_and_starts_no_other(tmp_path: Path, stand_in: StandIn) -> None:
    stand_in("echo $$; exec sleep 60")
    processes, statuses, log = Processes(), list[int](), tmp_path / "log"
    thread = threading.Thread(target=lambda: statuses.append(processes.run(["fit"], log)))
    thread.start()
    _wait(lambda: log.is_file() and len(log.read_text(encoding="utf-8").splitlines()) == 2)
    processes.stop()
    thread.join(10)
    assert statuses == [-signal.SIGTERM]
    assert processes.run(["fit"], log) == -signal.SIGTERM
    assert len(log.read_text(encoding="utf-8").splitlines()) == 2, "no other began"


def test_the_stubborn_are_killed(tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtale_lightning.launching.processes.GRACE", 0.2)
    stand_in("trap '' TERM; echo ready; while :; do sleep 0.05; done")
    processes, statuses, log = Processes(), list[int](), tmp_path / "log"
    thread = threading.Thread(target=lambda: statuses.append(processes.run(["fit"], log)))
    thread.start()
    _wait(lambda: log.is_file() and "ready" in log.read_text(encoding="utf-8"))
    processes.stop()
    thread.join(10)
    assert statuses == [-signal.SIGKILL]
