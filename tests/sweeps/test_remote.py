"""What is asked of W&B, whose server and agent are stubbed."""

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


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Notes what it is given."""
    seen: dict[str, Any] = {}

    def sweep(config: dict[str, Any], project: str) -> str:
        seen["config"] = config
        return "abc123"

    def run(command: list[str], env: dict[str, str], check: bool) -> Any:
        seen.update(command=command, env=env)
        return SimpleNamespace(returncode=3)

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    monkeypatch.setattr(wandb, "sweep", sweep)
    monkeypatch.setattr(wandb, "Api", lambda: SimpleNamespace(default_entity="team"))
    monkeypatch.setattr(subprocess, "run", run)
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


@pytest.mark.parametrize(("mode", "login"), [("offline", True), ("disabled", True), ("online", False)])
def test_without_a_server_the_way_out_is_said(
    server: dict[str, Any], monkeypatch: pytest.MonkeyPatch, mode: str, login: bool
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setattr(wandb, "login", lambda **_: login)
    with pytest.raises(ValueError, match="LOCAL=1"):
        remote.join("team/qtale/abc123")


def test_a_server_that_fails_is_no_traceback(
    server: dict[str, Any], define: Callable[..., SweepDefinition], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise wandb.errors.CommError("no such host")

    monkeypatch.setattr(wandb, "sweep", fails)
    with pytest.raises(ValueError, match=r"no such host.*LOCAL=1"):
        remote.create(define(), "qtale")
