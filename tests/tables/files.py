"""Tables from their command lines, and where tests find what they wrote."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qtale_lightning.commands import COMMANDS
from qtale_lightning.commands.parser import parse
from qtale_lightning.commands.tables import requested
from qtale_lightning.launching import Launcher
from qtale_lightning.tables import command
from qtale_lightning.tables.request import Asked

# What some declared tables need of a run's options: `phases` is of answers that are written.
NEEDED = {"phases": ("--data.answers", "generated")}


def asked(name: str, arguments: Sequence[str]) -> Asked:
    """What a command line of ``table`` or ``figures`` asks for."""
    _, run = parse([name, *arguments], COMMANDS)
    assert isinstance(run, partial)
    return requested(**run.keywords)


def table(arguments: Sequence[str], launch: Launcher | None = None) -> None:
    """``table`` from its command line."""
    command.table(asked("table", arguments), launch)


def figures(arguments: Sequence[str]) -> None:
    """``figures`` from its command line."""
    command.figures(asked("figures", arguments))


def folder(arguments: list[str], name: str, data: str = "facts") -> Path:
    """The folder of a table, from its command line."""
    return Path(arguments[arguments.index("--out") + 1]) / "tables" / f"{name}-tiny-{data}"


def rows(arguments: list[str], name: str) -> list[dict[str, Any]]:
    """The rows of its JSON."""
    return json.loads((folder(arguments, name) / "table.json").read_text(encoding="utf-8"))["rows"]


def row_of(found: list[dict[str, Any]], name: str, bits: float) -> dict[str, Any]:
    """The row of a line at some bits."""
    return next(row for row in found if (row["name"], row["bits"]) == (name, bits))
