"""Commands of the suite as processes of their own, which end when the sweep is told to."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import FrameType
from typing import Any

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
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        lock: int | None = None,
    ) -> int:
        """Exit status of ``python -m qtale_lightning ARGUMENTS``, under a held lock; its output goes to a file, or
        here."""
        command = [sys.executable, "-m", "qtale_lightning", *arguments]
        with open(log, "ab") if log else _here() as output, self._lock:
            if self.stopped:
                return -signal.SIGTERM
            # A session of its own: Ctrl-C is for the sweep, which then stops its runs in their own time.
            inherited = passing(lock)
            process = subprocess.Popen(
                command,
                pass_fds=inherited.get("pass_fds", ()),
                env={**os.environ, **inherited.get("env", {}), **(environment or {})},
                stdout=output,
                stderr=subprocess.STDOUT if log else None,
                start_new_session=True,
            )
            self._running.add(process)
        status = process.wait()
        with self._lock:
            self._running.discard(process)
        return status

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

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """SIGTERM, which W&B's agent sends to stop a run, ends the commands as Ctrl-C does."""

        def interrupt(number: int, frame: FrameType | None) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, interrupt)
        try:
            yield
        except KeyboardInterrupt:
            self.stop()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _here() -> Iterator[Any]:
    yield None
