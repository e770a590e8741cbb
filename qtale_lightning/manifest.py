"""``<run>/manifest.json``: what the run has written, so that a damaged file is named instead of read.

Every file that a run writes whole has its SHA-256 there. Files that aren't listed (of runs older than the manifest, or
taken off the list by hand) are read as they are.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from qtale_lightning.files import replacing

FILE_NAME = "manifest.json"
_NOW = 1_000_000_000  # nanoseconds: coarser than file systems' clocks
_ABSENT = ""  # stands for no file among the digests of one that is being written


class DamagedFileError(ValueError):
    """A file isn't what the run wrote; the message names it and what to do."""

    of_the_machine = True  # not of what was asked


@contextmanager
def writing(root: Path, target: Path) -> Iterator[Path]:
    """As :func:`~qtale_lightning.files.replacing`, for a file or folder of the run at ``root``, and listed there.

    The new content is listed before it takes its place, beside what may be there, and alone afterwards: a process that
    is killed in between leaves what is on the list either way. Only the process that has the run's lock may write.

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
        before = _load(root)
        kept = {name: known for name, known in before.items() if not Path(name).is_relative_to(within)}
        _save(root, kept | {name: [value, *before.get(name, [_ABSENT])] for name, value in new.items()})
    with suppress(OSError):  # what is there is listed, if not alone
        _save(root, kept | {name: [value] for name, value in new.items()})


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


def record(root: Path, paths: Iterable[Path]) -> None:
    """List files below ``root`` that a library wrote, as they are now."""
    listed = _load(root)
    found = {path.relative_to(root).as_posix(): [digest(path)] for path in paths}
    if any(listed.get(name) != known for name, known in found.items()):
        _save(root, listed | found)


def listed(root: Path, folder: Path) -> dict[str, str]:
    """The digests on the list of a folder's files, by name: what they are if they are sound.

    A file that is being replaced, of which there are two, is left out.
    """
    within = folder.relative_to(root)
    known = {Path(name): digests for name, digests in _load(root).items()}
    return {name.name: found[0] for name, found in known.items() if name.parent == within and len(found) == 1}


def read_object(root: Path, path: Path, remedy: str, keys: Iterable[str] = ()) -> dict[str, Any]:
    """What a JSON file of the run at ``root`` holds: an object that has these keys.

    Raises:
        DamagedFileError: It isn't what the run wrote, or no such object; the message names it and ends with the remedy.
    """
    verify(root, path, remedy)
    return parse_object(path, remedy, keys)


def parse_object(path: Path, remedy: str, keys: Iterable[str] = ()) -> dict[str, Any]:
    """As `read_object`, of a file that needn't belong to a run."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        place = f"{path}, line {error.lineno}, column {error.colno}"
        raise DamagedFileError(f"{place}: not JSON ({error.msg}): {remedy}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise DamagedFileError(f"{path} isn't JSON ({error}): {remedy}") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing or not isinstance(content, dict):
        lacks = f"lacks {', '.join(map(repr, missing))}" if missing else "holds no object"
        raise DamagedFileError(f"{path} {lacks}: {remedy}")
    return content


def digest(path: Path) -> str:
    """SHA-256 of a file's content, or of a folder's files and their names, in hexadecimal.

    A file is read once a process, and again when its size or time of change differ, or where it was written just now:
    another one that is written as soon has the same.
    """
    if path.is_dir():
        parts = {
            part.relative_to(path).as_posix(): digest(part) for part in path.rglob("*") if part.is_file()
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    status = path.stat()
    if time.time_ns() - status.st_mtime_ns < _NOW:
        return _file_digest.__wrapped__(path)
    return _file_digest(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _file_digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_one_of(path: Path, known: list[str]) -> bool:
    return (digest(path) if path.is_file() else _ABSENT) in known


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
