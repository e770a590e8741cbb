"""A sweep on W&B's server, and the agents that run it here and elsewhere."""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from qtale_lightning.sweeps.definition import SweepDefinition
from qtale_lightning.wandb_session import Session, has_key

WITHOUT = "LOCAL=1 of make (--local) runs the same sweep without a server"

IDLE = 600
"""Seconds after which an agent ends that is given nothing to run: W&B's own would ask a dead server for ever."""

POLL = 5
"""Seconds between two looks at what an agent does."""


def require_login() -> None:
    """Refuse where no sweep can be registered (ValueError)."""
    import wandb

    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        raise ValueError(f"a sweep needs W&B's server, but WANDB_MODE is {mode}: unset it, or {WITHOUT}")
    try:
        found = has_key()
    except Exception as error:  # its failures have many types
        raise ValueError(f"a sweep needs W&B's server, and {error} `wandb login`, or {WITHOUT}") from None
    finally:
        wandb.teardown()  # its process would go on beside the agent's own
    if not found:
        raise ValueError(f"a sweep needs W&B's server, and nobody is logged in: `wandb login`, or {WITHOUT}")


def create(sweep: SweepDefinition, project: str) -> str:
    """Registers a sweep; returns its path, entity/project/id.

    Raises:
        ValueError: as `require_login`, or the server doesn't take it, or doesn't answer for a minute.
    """
    require_login()
    import wandb

    try:
        identity = wandb.sweep(sweep.model_dump(exclude_none=True), project=project)
        entity = os.environ.get("WANDB_ENTITY") or wandb.Api().default_entity
    except Exception as error:  # its failures have many types
        raise ValueError(f"W&B didn't take the sweep ({error}); {WITHOUT}") from error
    finally:
        wandb.teardown()
    return f"{entity}/{project}/{identity}"


def join(path: str, count: int | None = None) -> int:
    """Exit status of an agent that runs a sweep's trials here, with this interpreter, until there are no more.

    Raises:
        ValueError: as `require_login`, or the agent had nothing to run for `IDLE` seconds.
    """
    require_login()
    limit = [] if count is None else ["--count", str(count)]
    # The agent starts `python`, whichever it finds first.
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [sys.executable, "-m", "wandb", "agent", *limit, path]
    with tempfile.TemporaryDirectory(prefix="qtale-agent-") as scratch:
        # It notes each run's parameters in its folder, by default `wandb` in the current one.
        environment = {"WANDB_DIR": scratch, **os.environ, "PATH": search}
        return _watch(subprocess.Popen(command, env=environment), path)


def _watch(agent: "subprocess.Popen[bytes]", path: str) -> int:
    """Waits for an agent, as long as it has something to run."""
    busy = time.monotonic()
    while True:
        try:
            return agent.wait(POLL)
        except subprocess.TimeoutExpired:
            if _runs_something(agent.pid):
                busy = time.monotonic()
        except KeyboardInterrupt:  # the agent is told, too: it ends its runs, and then itself
            continue
        if time.monotonic() - busy > IDLE:
            agent.kill()
            agent.wait()
            raise ValueError(
                f"W&B gave the agent nothing to run for {IDLE} seconds: its server is gone, or the sweep {path} is "
                "paused. What ran is kept; join the sweep again to go on"
            )


def _runs_something(agent: int) -> bool:
    with suppress(psutil.Error):
        return any(not child.name().startswith("wandb") for child in psutil.Process(agent).children())
    return False


def log_outcome(record: dict[str, Any], folder: Path) -> None:
    """Under an agent: what a stage measured, since only `fit` has a logger of its own.

    At one precision its figures have their plain names, which sweep files optimise.

    Args:
        record: The trial's.
        folder: The trial's, for W&B's record.
    """
    session = Session.start(folder, "auto", os.environ.get("WANDB_PROJECT", "qtale"))
    if session is None:
        return
    session.do("the command", lambda run: run.config.update({"command": record["command"]}))
    for row in record["outcome"]:
        session.do("the outcome", partial(_log, row))
    session.finish()


def _log(row: dict[str, Any], run: Any) -> None:
    run.log({name: value for name, value in row.items() if value is not None})
