"""What is asked of W&B, whose server and agent are stubbed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from qtale_lightning.sweeps import remote
from qtale_lightning.sweeps.definition import SweepDefinition
from tests.offline_record import read_offline


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Notes what it is given."""
    seen: dict[str, Any] = {}

    def sweep(config: dict[str, Any], project: str) -> str:
        seen["config"] = config
        return "abc123"

    def start(command: list[str], env: dict[str, str]) -> Any:
        seen.update(command=command, env=env, scratch=Path(env["WANDB_DIR"]).is_dir())
        return SimpleNamespace(wait=lambda timeout: 3)

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    monkeypatch.setattr(remote, "has_key", lambda: True)
    monkeypatch.setattr(wandb, "sweep", sweep)
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(default_entity="team"))
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setattr(subprocess, "Popen", start)
    return seen


def test_a_sweep_is_registered_as_its_file_says(
    server: dict[str, Any], define: Callable[..., SweepDefinition]
) -> None:
    sweep = define(early_terminate={"type": "hyperband", "min_iter": 3}).resolved({"OUT": "runs"})
    assert remote.create(sweep, "qtale") == "team/qtale/abc123"
    config = server["config"]
    assert config["parameters"] == {"model.lr": {"values": [0.1, 0.2]}}
    assert config["early_terminate"] == {"type": "hyperband", "min_iter": 3}  # W&B's alone, and kept for it
    assert "--to=runs/x" in config["command"]
    assert config["command"][-1] == "${args}"
    assert "run_cap" not in config


def test_an_agent_finds_this_interpreter_first(server: dict[str, Any]) -> None:
    assert remote.join("team/qtale/abc123", 4) == 3
    assert server["command"][1:] == ["-m", "wandb", "agent", "--count", "4", "team/qtale/abc123"]
    assert server["env"]["PATH"].split(":")[0] == str(Path(sys.executable).parent)


def test_an_agents_files_go_elsewhere_than_the_checkout(server: dict[str, Any]) -> None:
    remote.join("team/qtale/abc123")
    assert server["scratch"]
    assert not Path(server["env"]["WANDB_DIR"]).exists(), "they are its own"


class Agent:
    """One that asks and asks, and has started nothing."""

    pid, killed = os.getpid(), False

    def wait(self, timeout: float | None = None) -> int:
        if self.killed:
            return -9
        raise subprocess.TimeoutExpired("agent", timeout or 0)

    def kill(self) -> None:
        self.killed = True


def test_an_agent_without_a_server_ends(server: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Agent()
    monkeypatch.setattr(subprocess, "Popen", lambda command, env: agent)
    monkeypatch.setattr(remote, "IDLE", 0)
    monkeypatch.setattr(remote, "_runs_something", lambda pid: False)
    with pytest.raises(ValueError, match="join the sweep again"):
        remote.join("team/qtale/abc123")
    assert agent.killed


def test_an_agent_is_busy_while_a_run_of_its_lives() -> None:
    agent = (
        "read start; sleep 60 & run=$!; echo started; read stop; kill $run; wait $run; echo ended; read end"
    )
    with subprocess.Popen(
        ["sh", "-c", agent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert not remote._runs_something(process.pid)
        for said, busy in (("started", True), ("ended", False)):
            process.stdin.write("\n")
            assert process.stdout.readline() == f"{said}\n"
            assert remote._runs_something(process.pid) == busy


@pytest.mark.parametrize(("mode", "login"), [("offline", True), ("disabled", True), ("online", False)])
def test_without_a_server_the_way_out_is_said(
    server: dict[str, Any], monkeypatch: pytest.MonkeyPatch, mode: str, login: bool
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(remote, "has_key", lambda: login)
    with pytest.raises(ValueError, match="LOCAL=1"):
        remote.join("team/qtale/abc123")


def test_a_malformed_key_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    wandb.teardown()
    with pytest.raises(ValueError, match=r"API key must have 40\+ characters.*LOCAL=1"):
        remote.require_login()


def test_what_a_stage_measured_goes_to_the_trials_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "sweeps/x"
    record = {"command": "python -m …", "outcome": [{"bits": 3, "average_nll": 0.5, "theta": None}]}
    remote.log_outcome(record, folder)
    (kept,) = folder.glob("wandb/offline-run-*")
    logged = read_offline(kept)
    assert logged.config["command"] == "python -m …"
    assert [(row["bits"], row["average_nll"], "theta" in row) for row in logged.history] == [(3, 0.5, False)]
    assert [file.name for file in tmp_path.iterdir()] == ["sweeps"]


def test_a_server_that_fails_is_no_traceback(
    server: dict[str, Any], define: Callable[..., SweepDefinition], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise wandb.errors.CommError("no such host")

    monkeypatch.setattr(wandb, "sweep", fails)
    with pytest.raises(ValueError, match=r"no such host.*LOCAL=1"):
        remote.create(define(), "qtale")
