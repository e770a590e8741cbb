"""Weights & Biases, best effort: training never waits for it and never stops because of it."""

import logging
import netrc
import os
import secrets
from pathlib import Path
from typing import Literal

from lightning.pytorch.loggers import WandbLogger

log = logging.getLogger(__name__)

WandbMode = Literal["auto", "online", "offline", "disabled"]


def logged_in() -> bool:
    """Whether W&B finds an API key without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb_logger(root: Path, mode: WandbMode, project: str) -> WandbLogger | None:
    """A started logger that writes to ``<run>/wandb``; None where W&B is disabled or can't be started at all.

    Online falls back to offline when the server doesn't answer. A run keeps its W&B id, so that a resumed run goes on
    in the same place.
    """
    if mode == "auto":
        mode = "online" if logged_in() else "offline"
    if mode == "disabled":
        return None
    import wandb

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
    return None
