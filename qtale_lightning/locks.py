"""One process at a time writes into a folder: a lock that ends with the process that holds it, however that ends."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

FILE_NAME = ".lock"

INHERITED = "QTALE_LOCK_FD"
"""Variable with the descriptor of a lock that a process was started under, see :func:`passing`."""

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


class InUseError(OSError):
    """Another process is at work in the folder; the message says which."""


@contextmanager
def locked(folder: Path, command: str, waiting: Callable[[str], None] | None = None) -> Iterator[int | None]:
    """Have a folder for this process while the block runs; it is made, and removed where nothing was put into it.

    The lock is the system's own (flock) on ``<folder>/.lock``: a killed process leaves none. A process that was
    started under the folder's lock works under it. Of several processes that train one run together, the first takes
    it for all.

    Args:
        command: What this process does, for others' messages.
        waiting: Told once where another process has the lock, which is then waited for. None: don't wait.

    Yields:
        The lock's descriptor, for :func:`passing`; None where this process needs none.

    Raises:
        InUseError: Another process has it.
    """
    path = folder / FILE_NAME
    if is_helper() or _is_inherited(path):
        yield None
        return
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    descriptor = _take(path, waiting)
    try:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time(), "command": command}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield descriptor
    finally:
        if made and [*folder.iterdir()] == [path]:  # what was to be done in it was refused
            path.unlink()
            with suppress(OSError):  # another process has put something into a parent
                for empty in made:
                    empty.rmdir()
        os.close(descriptor)


def passing(lock: int | None) -> dict[str, Any]:
    """Arguments of ``subprocess.Popen`` with which a process works under a lock, and holds it as long as it lives."""
    if lock is None:
        return {}
    return {"pass_fds": (lock,), "env": {**os.environ, INHERITED: str(lock)}}


def _take(path: Path, waiting: Callable[[str], None] | None) -> int:
    """The descriptor of a lock file that is locked, and still the one at that path."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, path.parent, waiting)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, waiting: Callable[[str], None] | None) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        said = f"{folder} is in use: {_holder(descriptor)} is at work on it"
        if waiting is None:
            raise InUseError(
                f"{said}. Wait until it is done, or stop it and start this command again"
            ) from None
        waiting(f"{said}; waiting for it")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning("%s: this file system has no locks, so keep other processes off it yourself", folder)


def _holder(descriptor: int) -> str:
    """Who has a lock, in words."""
    try:
        holder = json.loads(os.pread(descriptor, 65536, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
        return (
            f"process {holder['pid']} on {holder['host']} ({holder['command']}, since {since}) or its child"
        )
    except (ValueError, KeyError, TypeError):
        return "another process"


def _is_inherited(path: Path) -> bool:
    """Whether the process that started this one passed it the lock of this very file."""
    given = os.environ.get(INHERITED, "")
    try:
        return given.isdecimal() and os.path.samestat(os.fstat(int(given)), path.stat())
    except OSError:
        return False


def is_helper() -> bool:
    """Whether this is one of several processes of a training, and not the first."""
    return any(os.environ.get(rank, "0") != "0" for rank in _RANKS)
