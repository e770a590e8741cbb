"""What has been measured: written at once, and not measured again."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common import write

SETTINGS = "settings"
"""The column, of the JSON alone, of what a row's figures hang on besides engine, bits and set."""


class Record:
    """The rows of a benchmark, in its JSON where a file is given.

    Attributes:
        rows: All of them, of earlier calls, too.
        claims: Of earlier calls.
    """

    def __init__(self, name: str, target: Path | None, settings: Mapping[str, Any]) -> None:
        """Reads what is there.

        Raises:
            ValueError: It is of other settings, or no measurements of this benchmark; names them.
        """
        self.name, self.target, self.settings = name, target, dict(settings)
        self.rows: list[dict[str, Any]] = []
        self.claims: list[dict[str, Any]] = []
        if target is None or not target.is_file():
            return
        content = json.loads(target.read_text(encoding="utf-8"))
        if content.get("benchmark") != name:
            raise ValueError(f"{target} holds no measurements of {name}: name another file")
        for row in content["rows"]:
            _check_same(target, row.get(SETTINGS), json.loads(json.dumps(self.settings)))
        self.rows, self.claims = content["rows"], content["claims"]

    def has(self, engine: str, bits: Iterable[float], number: int) -> bool:
        """Whether an engine's rows at some bits, of a calibration set, are there."""
        there = {(row["engine"], row["bits"], row["set"]) for row in self.rows}
        return all((engine, one, number) in there for one in bits)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keeps rows, in the file at once, in place of those of the same engine, bits and set."""
        made = [{**row, SETTINGS: self.settings} for row in rows]
        keys = {(row["engine"], row["bits"], row["set"]) for row in made}
        kept = [row for row in self.rows if (row["engine"], row["bits"], row["set"]) not in keys]
        self.rows = sorted(kept + made, key=lambda row: (-row["bits"], row["engine"], row["set"]))
        write(self.name, self.rows, self.claims, self.target)


def _check_same(target: Path, found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    if found is None:
        raise ValueError(
            f"{target} says nothing of its rows' settings, so that none can be added: name another file"
        )
    other = [
        f"{key} {found.get(key)!r} instead of {wanted.get(key)!r}"
        for key in {**found, **wanted}
        if found.get(key) != wanted.get(key)
    ]
    if other:
        raise ValueError(
            f"{target} holds rows of other settings ({'; '.join(other)}): measure with those, or name another file"
        )
