"""Commands as processes: what they leave is kept, a killed table's process is waited for, W&B gets the table."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qtale_lightning.__main__ import main
from qtale_lightning.locks import INHERITED
from qtale_lightning.tables.command import stop
from qtale_lightning.tables.execution import start_process
from qtale_lightning.tables.publish import publish
from tests.tables.files import table

Arguments = Callable[..., list[str]]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Something quicker in the interpreter's place: a shell script."""

    def put(script: str) -> None:
        file = tmp_path / "python"
        file.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        file.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(file))

    return put


def test_a_process_writes_its_log_and_returns_its_status(
    tmp_path: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in('echo "$@"; echo problem >&2; exit 3')
    with (tmp_path / "lock").open("w") as lock:
        assert start_process(["fit", "--out", "a folder"], tmp_path / "log", lock.fileno()) == 3
    assert (tmp_path / "log").read_text(encoding="utf-8").splitlines() == [
        "$ python -m qtale_lightning fit --out 'a folder'",
        "-m qtale_lightning fit --out a folder",
        "problem",
    ]


def test_a_stopped_table_stops_its_process(tmp_path: Path, stand_in: Callable[[str], None]) -> None:
    """SIGTERM, as a scheduler sends it."""
    stand_in("echo $$; exec sleep 60")
    log = tmp_path / "log"
    previous = signal.signal(signal.SIGTERM, stop)
    stopping = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
    stopping.start()
    try:
        with (tmp_path / "lock").open("w") as lock, pytest.raises(SystemExit) as ended:
            start_process([], log, lock.fileno())
    finally:
        stopping.cancel()
        signal.signal(signal.SIGTERM, previous)
    assert ended.value.code == 128 + signal.SIGTERM
    child = int(log.read_text(encoding="utf-8").splitlines()[1])
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.slow
def test_real_commands_make_a_table(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One real run, at its very smallest, by the commands themselves (in this process: starting one takes 10 s)."""
    file = tmp_path / "small.yaml"
    file.write_text(
        "title: t\ncompare: [name]\ncells:\n"
        "  - {name: QTALE, method: qtale, bits: [16, 3], theta: {rule: one-standard-error}}\n"
        "  - {name: at 0.7, method: qtale, bits: [3], theta: {rule: budget, budget: 0.7}}\n"
        "  - {name: at θ, method: qtale, bits: [3], theta: 0.45}\n",
        encoding="utf-8",
    )
    more = ["--data.limit_validation", "12", "--data.calibration_rows", "12", "--data.limit_train", "64"]
    given = arguments(str(file), *more, "--data.batch_size", "8", "--quantize.sequences", "32")
    kinds = []

    def start(command: Sequence[str], log: Path, lock: int | None) -> int:
        kinds.append(command[0])
        monkeypatch.setenv(INHERITED, str(lock))
        main(list(command))
        return 0

    table(given, start)
    assert kinds == ["fit", "thresholds", "evaluate"]
    folder = tmp_path / "out/tables/small-tiny-facts"
    first = {one.name: one.read_bytes() for one in folder.glob("table.*")}
    assert b"failed |" not in first["table.md"]
    table(given, start)
    assert len(kinds) == 3, "nothing is missing"
    assert {one.name: one.read_bytes() for one in folder.glob("table.*")} == first


@pytest.mark.slow
def test_wandb_gets_the_table(arguments: Arguments, commands: Any, tmp_path: Path) -> None:
    table(arguments("csqa"), commands)
    folder = tmp_path / "out/tables/csqa-tiny-facts"
    assert not (folder / "wandb").exists(), "--wandb disabled"

    content = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    publish(content, folder, ["--wandb=offline"])
    (record,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert record.stat().st_size > 0
    (shown,) = record.parent.glob("files/media/table/csqa_*.table.json")
    saved = json.loads(shown.read_text(encoding="utf-8"))
    assert len(saved["data"]) == len(content["rows"])
    at = saved["columns"].index("nll")
    assert [row[at] for row in saved["data"]] == [row["values"]["nll"]["value"] for row in content["rows"]]
