"""Writing files and folders that are there whole or not at all, on a full disk and in a killed process, too."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNFINISHED = re.compile(r"\.(?P<name>.+)\.\d+\.(?P<kind>tmp|old)")


def user_cache() -> Path:
    """Where the suite keeps what it can make again: of this user, for all runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtale_lightning"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path for a file or folder that takes ``target``'s place when the block ends without an error.

    It lies beside ``target``, so that taking its place is one step, and its content is on the disk before it does:
    what stands under ``target``'s name is whole after a power cut, too.

    Raises:
        OSError: It couldn't be written; the error names ``target``, whatever library wrote, and what was there stays.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        if target.is_dir() and temporary.is_dir():  # a folder with content can't be replaced in one step
            os.replace(target, aside := temporary.with_suffix(".old"))
            os.replace(temporary, target)
            shutil.rmtree(aside)
        else:
            os.replace(temporary, target)
        _sync_entry(target.parent)
    except Exception as error:
        if (number := _disk_error(error)) is not None:
            raise OSError(number, os.strerror(number), str(target)) from error
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what killed processes left of :func:`replacing` under ``folder``; only for who alone writes there.

    A folder that was moved aside when the process died is put back where nothing took its place.

    Returns:
        What was removed or put back.
    """
    found = []
    for path in sorted(folder.rglob(".*")):
        if (match := _UNFINISHED.fullmatch(path.name)) is None or not path.exists():
            continue
        target = path.with_name(match["name"])
        if match["kind"] == "old" and not target.exists():
            os.replace(path, target)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        found.append(path)
    return found


def _sync(path: Path) -> None:
    """Have the content of a file, or of all files under a folder, on the disk."""
    for part in path.rglob("*") if path.is_dir() else [path]:
        if part.is_file():
            with part.open("rb") as file:
                os.fsync(file.fileno())


def _sync_entry(folder: Path) -> None:
    """Have a folder's names on the disk; some file systems can't, and lose no more than the last change by it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _disk_error(error: BaseException | None) -> int | None:
    """The errno of an error of the disk, or of one that it came up after: PyTorch fails again where writing failed.

    Libraries in other languages say it in words; PyTorch, where it opens the file itself, not even that.
    """
    if error is None:
        return None
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
        return error.errno if full and error.filename is None else None
    if (named := re.search(r"\(os error (\d+)\)", str(error))) is not None:
        return int(named[1])
    return _disk_error(error.__context__) or (
        errno.ENOSPC if "PytorchStreamWriter failed" in str(error) or "iostream error" in str(error) else None
    )
