"""A W&B that refuses, hangs, answers by errors or breaks off, at the start and in the middle of a run; or whose own
process dies or stands still. Nothing waits for it longer than it says."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb

from qtale_lightning import wandb_session
from qtale_lightning.wandb_session import Session
from tests.wandb_endpoint import FAULTS, Endpoint, Fault, serving

KEY = "k" * 40
LONG = 8
"""Seconds for what takes none, on a machine that has much else to do. Without a bound it would be minutes."""
ROOT = Path(__file__).parent.parent


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A server of W&B's, whose answers aren't waited for long."""
    monkeypatch.setattr(wandb_session, "UPLOAD", 2)
    monkeypatch.setattr(wandb_session, "END", 12)
    with serving() as endpoint:
        for name, value in {"BASE_URL": endpoint.url, "API_KEY": KEY, "MODE": "online"}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        wandb.teardown()  # it has read the environment already
        yield endpoint
        wandb.teardown()


def helpers() -> list[psutil.Process]:
    """W&B's own processes that live."""
    found = psutil.Process().children(recursive=True)
    return [one for one in found if one.name().startswith("wandb") and one.status() != psutil.STATUS_ZOMBIE]


def started(root: Path) -> Session:
    session = Session.start(root, "auto", "qtale")
    assert session is not None
    return session


def log(session: Session, rows: int = 10) -> float:
    """Logs some rows; the seconds that this took whoever trains."""
    before = time.monotonic()
    for step in range(rows):
        session.do("metrics", partial(_row, step))
    return time.monotonic() - before


def _row(step: int, run: Any) -> None:
    run.log({"loss": 1.0, "step": step})


def finish(session: Session) -> float:
    before = time.monotonic()
    session.finish()
    return time.monotonic() - before


def test_what_is_logged_arrives(endpoint: Endpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    session = started(tmp_path)
    log(session)
    session.do("the summary", lambda run: run.summary.update({"selected/3bit/average_nll": 0.5}))
    finish(session)
    assert [row["step"] for row in endpoint.history] == list(range(10))
    assert endpoint.summary["selected/3bit/average_nll"] == 0.5
    assert endpoint.exits == [0]
    assert not helpers()
    assert "not uploaded" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_fails_at_the_start_leaves_an_offline_record(
    fault: Fault,
    endpoint: Endpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(wandb_session, "START", 2)
    endpoint.fail(fault)
    session = started(tmp_path)
    log(session)
    finish(session)
    assert session.folder.name.startswith("offline-run-")
    assert caplog.text.count("W&B can't be used online") == 1
    assert not helpers()


def test_training_goes_on_without_wandbs_own_process(
    endpoint: Endpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = started(tmp_path)
    for helper in helpers():
        helper.kill()
    assert log(session, rows=5000) < LONG
    assert finish(session) < wandb_session.END
    assert caplog.text.count("W&B did not take metrics") == 1
    assert f"W&B: not uploaded: wandb sync {session.folder}" in caplog.text


@pytest.mark.slow
def test_training_goes_on_where_wandbs_own_process_stands_still(
    endpoint: Endpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = started(tmp_path)
    for helper in helpers():
        helper.suspend()
    assert log(session, rows=5000) < LONG  # more than any socket takes in advance
    assert finish(session) < wandb_session.END + 1
    assert f"W&B: not uploaded: wandb sync {session.folder}" in caplog.text
    assert not helpers()


PROCESS = """
import sys, time
from pathlib import Path
sys.orig_argv, sys.argv = ["-m", "qtale_lightning"], ["-m", *sys.argv[1:]]  # a command imports only what it needs
import pandas
from qtale_lightning import wandb_session
wandb_session.UPLOAD, wandb_session.END = 2, 30
session = wandb_session.Session.start(Path(sys.argv[1]), "auto", "qtale")
print("started", flush=True)
sys.stdin.readline()
before = time.monotonic()
for step in range(2000):
    session.do("metrics", lambda run, step=step: run.log({"loss": 1.0, "step": step}))
frame = pandas.DataFrame({"bits": [3, 4]})
session.do("tables", lambda run: run.log({"evaluation": __import__("wandb").Table(dataframe=frame)}))
print(time.monotonic() - before, flush=True)
before = time.monotonic()
session.finish()
print(time.monotonic() - before, flush=True)
"""


@pytest.mark.slow
def test_a_server_that_fails_during_a_run_keeps_no_process(tmp_path: Path) -> None:
    """As processes of their own, all at once: each ends with status 0, and says how to upload what it has."""
    with serving() as one, serving() as two, serving() as three, serving() as four:
        endpoints = dict(zip(FAULTS, (one, two, three, four), strict=True))
        processes = {
            fault: start_process(tmp_path / fault, endpoint) for fault, endpoint in endpoints.items()
        }
        for fault, process in processes.items():
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"
            endpoints[fault].fail(fault)
            assert process.stdin is not None
            process.stdin.write("go on\n")
            process.stdin.flush()
        for fault, process in processes.items():
            output, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
            logged, ended = map(float, output.split())
            assert logged < LONG
            assert ended < 30
            (folder,) = (tmp_path / fault / "wandb").glob("run-2*")
            assert f"W&B: not uploaded: wandb sync {folder}" in errors.splitlines(), errors
            assert "Traceback" not in errors


def start_process(folder: Path, endpoint: Endpoint) -> "subprocess.Popen[str]":
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder.parent), "PYTHONPATH": str(ROOT)}
    environment |= {"WANDB_BASE_URL": endpoint.url, "WANDB_API_KEY": KEY, "WANDB_HTTP_TIMEOUT": "2"}
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, str(folder)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
