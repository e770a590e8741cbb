"""A table on W&B, where W&B is on: best effort, the local files are the truth."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import wandb

from qtale_lightning.settings import WandbMode
from qtale_lightning.tables.render import frame
from qtale_lightning.tracking import wandb_logger

log = logging.getLogger(__name__)


def publish(content: dict[str, Any], folder: Path, options: Sequence[str]) -> None:
    """Logs the table to a run of its own, by the `--wandb` and `--wandb_project` options of the table's runs."""
    logger = wandb_logger(
        folder,
        cast(WandbMode, _value(options, "--wandb", "auto")),
        _value(options, "--wandb_project", "qtale"),
    )
    if logger is None:
        return
    try:
        logger.experiment.log({content["table"]: wandb.Table(dataframe=frame(content))})
        logger.experiment.finish()
    except Exception as error:  # W&B's failures have many types, and none may cost a finished table
        log.warning("W&B did not take the table (%s); it is complete in %s", error, folder)


def _value(options: Sequence[str], name: str, default: str) -> str:
    """The last value of an option, as `--name value` or `--name=value`."""
    found = default
    for index, option in enumerate(options):
        if option == name and index + 1 < len(options):
            found = options[index + 1]
        elif option.startswith(f"{name}="):
            found = option.removeprefix(f"{name}=")
    return found
