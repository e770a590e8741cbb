"""Weights & Biases, best effort: training never waits for it and never stops because of it."""

import logging
import os
import secrets
from pathlib import Path

import wandb
from lightning.pytorch.loggers import WandbLogger

from qtale_lightning.settings import WandbMode

log = logging.getLogger(__name__)


def wandb_logger(root: Path, mode: WandbMode, project: str) -> WandbLogger | None:
    """A started logger that writes to ``<run>/wandb``; None where W&B is disabled or can't be started at all.

    Online falls back to offline when the server doesn't answer. A run keeps its W&B id, so that a resumed run goes on
    in the same place.
    """
    if mode == "auto":
        mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
    if mode == "disabled":
        return None
    identity = root / "wandb" / "run-id.txt"
    identity.parent.mkdir(parents=True, exist_ok=True)
    if not identity.is_file():
        identity.write_text(secrets.token_hex(4), encoding="utf-8")
    for attempt in dict.fromkeys((mode, "offline")):
        if attempt == "offline":
            os.environ.setdefault("WANDB_SILENT", "true")  # there is no page to announce
        logger = WandbLogger(
            name=root.name,
            project=project,
            save_dir=root,
            id=identity.read_text(encoding="utf-8").strip(),
            offline=attempt == "offline",
            resume="allow" if attempt == "online" else None,
            settings=wandb.Settings(silent=True, init_timeout=30),
        )
        try:
            logger.experiment.define_metric("*", step_metric="trainer/global_step")
            return logger
        except Exception as error:  # its failures have many types, and none may stop training
            log.warning("W&B can't be used %s (%s)", attempt, error)
            wandb.teardown()  # else it takes the run's id for one in use
    return None
