"""A table on W&B, where W&B is on: best effort, the local files are the truth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from qtale_lightning.settings import WandbMode
from qtale_lightning.tables.render import frame
from qtale_lightning.wandb_session import Session


def publish(content: dict[str, Any], folder: Path, options: Sequence[str]) -> None:
    """Logs the table to a run of its own, by the `--wandb` and `--wandb_project` options of the table's runs."""
    mode = cast(WandbMode, _value(options, "--wandb", "auto"))
    session = Session.start(folder, mode, _value(options, "--wandb_project", "qtale"))
    if session is None:
        return
    import wandb

    shown = frame(content)
    session.do("the table", lambda run: run.log({content["table"]: wandb.Table(dataframe=shown)}))
    session.finish()


def _value(options: Sequence[str], name: str, default: str) -> str:
    """The last value of an option, as `--name value` or `--name=value`."""
    found = default
    for index, option in enumerate(options):
        if option == name and index + 1 < len(options):
            found = options[index + 1]
        elif option.startswith(f"{name}="):
            found = option.removeprefix(f"{name}=")
    return found
