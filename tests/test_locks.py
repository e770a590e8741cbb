"""One process at a time works on a folder, the others are told which, and nobody is locked out for ever."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from qtale_lightning.__main__ import main
from qtale_lightning.locks import FILE_NAME, INHERITED, InUseError, locked, passing
from qtale_lightning.run import RunDirectory

# Without the package, whose import takes seconds: what the system does with the lock is the same.
SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]


def test_another_process_is_told_at_once_who_is_at_work(tmp_path: Path) -> None:
    with locked(tmp_path / "run", "python -m qtale_lightning fit"):  # noqa: SIM117
        with pytest.raises(InUseError) as refusal, locked(tmp_path / "run", "a second one"):
            pytest.fail("two have it")
    message = str(refusal.value)
    assert f"{tmp_path / 'run'} is in use: process {os.getpid()} on " in message
    assert f"(python -m qtale_lightning fit, since {time.strftime('%Y-%m-%d')}" in message
    assert "Wait until it is done" in message
    with locked(tmp_path / "run", "a third one") as lock:
        assert lock is not None


def test_other_folders_are_free(tmp_path: Path) -> None:
    with locked(tmp_path / "a", "fit"), locked(tmp_path / "b", "fit") as lock:
        assert lock is not None


def test_a_lock_ends_with_its_process_and_is_waited_for(tmp_path: Path) -> None:
    said: list[str] = []
    with locked(tmp_path, "table") as lock:
        child = subprocess.Popen(SLEEP, **passing(lock))
    # The table's own hold is gone, as if it had been killed; its child's isn't.
    with pytest.raises(InUseError), locked(tmp_path, "fit"):
        pytest.fail("two have it")
    threading.Timer(0.3, child.kill).start()
    started = time.perf_counter()
    with locked(tmp_path, "table", said.append):
        assert time.perf_counter() - started > 0.2
    child.wait()
    assert len(said) == 1
    assert "is in use" in said[0]


def test_what_is_started_under_a_lock_works_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path / "run", "table") as lock:
        monkeypatch.setenv(INHERITED, str(lock))
        with locked(tmp_path / "run", "fit") as own:
            assert own is None
        monkeypatch.delenv(INHERITED)
        with pytest.raises(InUseError), locked(tmp_path / "run", "fit"):
            pytest.fail("two have it")


def test_a_lock_of_another_folder_is_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path / "sweep", "trial") as lock:
        monkeypatch.setenv(INHERITED, str(lock))
        with locked(tmp_path / "run", "fit") as own:
            assert own is not None
        monkeypatch.setenv(INHERITED, "12345")  # of a process that is long gone
        with locked(tmp_path / "run", "fit") as own:
            assert own is not None


@pytest.mark.parametrize("rank", ["LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"])
def test_one_process_takes_it_for_all_that_train_together(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(rank, "0")
    with locked(tmp_path, "fit") as first:
        assert first is not None
        monkeypatch.setenv(rank, "1")
        with locked(tmp_path, "fit") as second:
            assert second is None


def test_a_killed_process_leaves_no_lock_and_its_leftovers_go(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    child = os.fork()
    if child == 0:
        with run.locked("fit"):
            (run.root / f".model.{os.getpid()}.tmp").mkdir()
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(run.root.glob("*.tmp"))) == 1
    with run.locked("fit"):
        assert [path.name for path in run.root.iterdir()] == [FILE_NAME]


def test_a_refused_command_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name in ("new", "old", "a/b/c"):
        with pytest.raises(ValueError, match="refused"), locked(tmp_path / name, "fit"):
            raise ValueError("refused")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    with locked(tmp_path / "new", "fit"):
        (tmp_path / "new" / "config.yaml").touch()
    assert (tmp_path / "new" / "config.yaml").is_file()


@pytest.mark.parametrize("command", ["quantize", "thresholds", "evaluate", "lm-eval", "inspect", "report"])
def test_every_command_that_writes_into_a_run_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("trainer: {}", encoding="utf-8")
    with locked(tmp_path, "python -m qtale_lightning fit"), pytest.raises(SystemExit) as end:
        main([command, str(tmp_path)])
    assert end.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"process {os.getpid()} on" in said
    assert "(python -m qtale_lightning fit, since" in said
