"""Reads what W&B records offline back from its files."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

# W&B has no reader of its own for Python: frames are read by their format, what is in them by its messages.
HEADER = b":W&B\xe1\xbe\x00"
BLOCK = 2**15
"""A LevelDB log: frames of (checksum, length, kind) and data, none across the end of a block."""
FULL, LAST = 1, 4


@dataclass
class Offline:
    """A run's record: configuration and summary as they ended, a dictionary for every step, files that were added."""

    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    run_id: str = ""

    def table(self, name: str, folder: Path) -> dict[str, Any]:
        """The content of a logged table, whose file lies in the run's folder."""
        (step,) = (step for step in self.history if f"{name}/path" in step)
        assert step[f"{name}/_type"] == "table-file"
        assert step[f"{name}/path"] in self.files
        return json.loads((folder / "files" / step[f"{name}/path"]).read_text(encoding="utf-8"))


def read_offline(folder: Path) -> Offline:
    """The record in an ``offline-run-…`` folder."""
    (file,) = folder.glob("*.wandb")
    found = Offline()
    for record in _records(file.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run_id = record.run.run_id
            found.config |= _values(record.run.config.update)
        elif kind == "config":
            found.config |= _values(record.config.update)
        elif kind == "summary":
            found.summary |= _values(record.summary.update)
        elif kind == "history":
            found.history.append(_values(record.history.item))
        elif kind == "files":
            found.files += [file.path for file in record.files.files]
    return found


def _records(data: bytes) -> Iterator[Record]:
    assert data[: len(HEADER)] == HEADER
    at, part = len(HEADER), b""
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST):
            yield Record.FromString(part)
            part = b""


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
