"""``<run>/manifest.json``: what the run has written, so that a damaged file is named instead of read.

Every file that a run writes whole has its SHA-256 there. Files that aren't listed (of runs older than the manifest, or
taken off the list by hand) are read as they are.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from qtale_lightning.files import replacing

FILE_NAME = "manifest.json"


class DamagedFileError(ValueError):
    """A file isn't what the run wrote; the message names it and what to do."""


@contextmanager
def writing(root: Path, target: Path) -> Iterator[Path]:
    """As :func:`~qtale_lightning.files.replacing`, for a file or folder of the run at ``root``, and listed there.

    The new content is listed before it takes its place, beside the old one: a process that is killed in between leaves
    a file that is on the list either way. Only the process that has the run's lock may write.

    Raises:
        OSError: It couldn't be written; what was there stays.
    """
    with replacing(target) as temporary:
        yield temporary
        within = target.relative_to(root)
        files = [path for path in temporary.rglob("*") if path.is_file()] if temporary.is_dir() else []
        new = {(within / path.relative_to(temporary)).as_posix(): digest(path) for path in files}
        if temporary.is_file():
            new[within.as_posix()] = digest(temporary)
        listed = _load(root)
        kept = {name: known for name, known in listed.items() if not Path(name).is_relative_to(within)}
        current = {name: [value, *listed.get(name, [])[:1]] for name, value in new.items()}
        _save(root, kept | current)


def keep(root: Path, source: Path, target: Path) -> None:
    """Have the file at ``source`` at ``target``, too, and listed there: what is written to ``source`` leaves it alone.

    Raises:
        OSError: It couldn't be done; what was there stays.
    """
    within, name = (path.relative_to(root).as_posix() for path in (source, target))
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(source, temporary)
        listed = _load(root)
        before, known = listed.pop(name, []), listed.get(within, [])
        _save(root, listed | ({name: [*known, *before]} if known else {}))
    if before:
        _save(root, listed | ({name: known} if known else {}))


def verify(root: Path, path: Path, remedy: str) -> Path:
    """The path of a file or folder that is as the run at ``root`` wrote it.

    Args:
        remedy: What to do about a damaged one, as a sentence's second half: "remove it: … makes it again".

    Raises:
        DamagedFileError: It is listed, and its content is another; or a listed file of the folder is missing.
    """
    for name, known in _load(root).items():
        within = Path(name).is_relative_to(path.relative_to(root))
        if within and not _is_one_of(root / name, known):
            # Written between the two readings by another process: then it is on the list by now.
            if _is_one_of(root / name, _load(root).get(name, [])):
                continue
            what = "isn't what this run wrote" if (root / name).is_file() else "is missing"
            raise DamagedFileError(f"{root / name} {what} (see {root / FILE_NAME}): {remedy}")
    return path


def digest(path: Path) -> str:
    """SHA-256 of a file's content, or of a folder's files and their names, in hexadecimal.

    A file is read once a process, and again when its size or time of change differ.
    """
    if path.is_dir():
        parts = {
            part.relative_to(path).as_posix(): digest(part) for part in path.rglob("*") if part.is_file()
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    status = path.stat()
    return _file_digest(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _file_digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_one_of(path: Path, known: list[str]) -> bool:
    return path.is_file() and digest(path) in known


def _load(root: Path) -> dict[str, list[str]]:
    path = root / FILE_NAME
    if not path.is_file():
        return {}
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): [str(value) for value in known] for name, known in content["sha256"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(
            f"{path} can't be read ({error}): remove it, and the run's files are read as they are"
        ) from error


def _save(root: Path, listed: Mapping[str, list[str]]) -> None:
    with replacing(root / FILE_NAME) as temporary:
        text = json.dumps({"sha256": dict(sorted(listed.items()))}, indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")
