"""Commands of the suite as processes of their own, which end when they are told to."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Lock
from types import FrameType

from qtale_lightning.locks import passing

GRACE = 60
"""Seconds that a stopped run has to save what it would resume from."""


class Processes:
    """Runs commands, several at once if asked from several threads, and stops all of them together."""

    def __init__(self) -> None:
        self.stopped = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = Lock()

    def run(
        self,
        arguments: Sequence[str],
        log: Path | None = None,
        lock: int | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> int:
        """Exit status of ``python -m qtale_lightning ARGUMENTS``.

        The process inherits a held lock: where this one is killed, it holds the lock until it is done, and a new start
        waits for it.

        Args:
            log: A file that its output is appended to, after the command; None: it goes where this process's goes.
            environment: Variables that it has besides this process's; None: it hasn't this one.
        """
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") if log else nullcontext() as output, self._lock:
            if self.stopped:
                return -signal.SIGTERM
            if output is not None:
                output.write(f"$ python -m qtale_lightning {shlex.join(arguments)}\n".encode())
                output.flush()
            inherited = passing(lock)
            variables = {**os.environ, **inherited.get("env", {}), **(environment or {})}
            # A session of its own: Ctrl-C is for this process, which then stops its runs in their own time.
            process = subprocess.Popen(
                [sys.executable, "-m", "qtale_lightning", *arguments],
                pass_fds=inherited.get("pass_fds", ()),
                env={name: value for name, value in variables.items() if value is not None},
                stdout=output,
                stderr=subprocess.STDOUT if log else None,
                start_new_session=True,
            )
            self._running.add(process)
        try:
            return process.wait()
        except BaseException:
            self.stop()
            raise
        finally:
            with self._lock:
                self._running.discard(process)

    def stop(self) -> None:
        """Asks all running commands to end, as a scheduler does, and starts no other; the stubborn are killed."""
        with self._lock:
            self.stopped = True
            running = list(self._running)
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM, which schedulers and W&B's agent send, ends what runs here by an exception, as Ctrl-C does."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
