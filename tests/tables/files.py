"""Where the tests of tables find what a table wrote."""

import json
from pathlib import Path
from typing import Any


def folder(arguments: list[str], name: str, data: str = "facts") -> Path:
    """The folder of a table, from its command line."""
    return Path(arguments[arguments.index("--out") + 1]) / "tables" / f"{name}-tiny-{data}"


def rows(arguments: list[str], name: str) -> list[dict[str, Any]]:
    """The rows of its JSON."""
    return json.loads((folder(arguments, name) / "table.json").read_text(encoding="utf-8"))["rows"]


def row_of(found: list[dict[str, Any]], name: str, bits: float) -> dict[str, Any]:
    """The row of a line at some bits."""
    return next(row for row in found if (row["name"], row["bits"]) == (name, bits))
