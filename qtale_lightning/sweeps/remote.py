"""A sweep on W&B's server, and the agents that run it here and elsewhere."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import wandb

from qtale_lightning.sweeps.definition import SweepDefinition

WITHOUT = "LOCAL=1 of make (--local) runs the same sweep without a server"


def require_login() -> None:
    """Refuse where no sweep can be registered (ValueError)."""
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        raise ValueError(f"a sweep needs W&B's server, but WANDB_MODE is {mode}: unset it, or {WITHOUT}")
    if not wandb.login(prompt=False, verify=False):
        raise ValueError(f"a sweep needs W&B's server, and nobody is logged in: `wandb login`, or {WITHOUT}")


def create(sweep: SweepDefinition, project: str) -> str:
    """Registers a sweep; returns its path, entity/project/id.

    Raises:
        ValueError: as `require_login`, or the server doesn't take it.
    """
    require_login()
    try:
        identity = wandb.sweep(sweep.model_dump(exclude_none=True), project=project)
        entity = os.environ.get("WANDB_ENTITY") or wandb.Api().default_entity
    except Exception as error:  # its failures have many types
        raise ValueError(f"W&B didn't take the sweep ({error}); {WITHOUT}") from error
    return f"{entity}/{project}/{identity}"


def join(path: str, count: int | None = None) -> int:
    """Exit status of an agent that runs a sweep's trials here, with this interpreter, until there are no more."""
    require_login()
    limit = [] if count is None else ["--count", str(count)]
    # The agent starts `python`, whichever it finds first.
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [sys.executable, "-m", "wandb", "agent", *limit, path]
    return subprocess.run(command, env={**os.environ, "PATH": search}, check=False).returncode


def log_outcome(record: dict[str, Any]) -> None:
    """Under an agent: what a stage measured, since only `fit` has a logger of its own.

    At one precision its figures have their plain names, which sweep files optimise.
    """
    with wandb.init(config={"command": record["command"]}) as run:
        for row in record["outcome"]:
            run.log({name: value for name, value in row.items() if value is not None})
