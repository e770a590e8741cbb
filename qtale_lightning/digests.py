"""Digests: by what content is known again. A path, a name or a count identifies nothing."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qtale_lightning import manifest

SAMPLE = 4096  # bytes of each tensor that tell a base model from another one


def of(content: object) -> str:
    """Digest of plain data: what JSON holds, whatever the order of keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def of_rows(rows: Iterable[Any]) -> str:
    """Digest of data classes of plain data, in their order."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(vars(row), sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def of_split(by_task: Mapping[str, str]) -> str:
    """Digest of a split's rows from those of its tasks, in their order."""
    return of([*by_task.items()])


def of_model(folder: Path, known: Mapping[str, str] | None = None) -> str:
    """Digest of an exported model: of its weights and configurations, not of its card or its tokenizer.

    Args:
        known: Digests of files by name, that are taken as they are; the others' content is read, once a process.
    """
    files = [*folder.glob("*.safetensors"), *folder.glob("*config.json")]
    parts = {file.name: (known or {}).get(file.name) or manifest.digest(file) for file in files}
    return of({name: part for name, part in parts.items() if name != "tokenizer_config.json"})


def of_base(folder: Path) -> str:
    """Digest of a pretrained model's folder that doesn't read all of it: 13 GB take half a minute and more.

    Of safetensors it takes the header and the first 4 KiB of every tensor, which no two trainings share; other files
    of weights, and the configuration, whole.
    """
    whole = [folder / "config.json", *folder.glob("*.bin"), *folder.glob("*.gguf"), *folder.glob("*.pt")]
    parts = {file.name: manifest.digest(file) for file in whole if file.is_file()}
    parts |= {file.name: _of_sampled(file) for file in folder.glob("*.safetensors")}
    return of(parts)


def _of_sampled(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > path.stat().st_size:  # not safetensors; loading it will say so
            return manifest.digest(path)
        header = file.read(start - 8)
        found.update(header)
        try:
            tensors = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
            places = sorted((int(begin), int(end)) for begin, end in (one["data_offsets"] for one in tensors))
        except (ValueError, KeyError, TypeError, AttributeError):
            return manifest.digest(path)
        for begin, end in places:
            file.seek(start + begin)
            found.update(file.read(min(SAMPLE, end - begin)))
    return found.hexdigest()
