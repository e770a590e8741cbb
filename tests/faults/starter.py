"""Starts commands of the suite as processes of their own without importing everything again for each.

Run as a script it imports the suite once, then forks for every line that it reads: JSON with `argv`, the `log` that
the output goes to, and, to end the process early, `kill_after` seconds and a `signal`. It answers each by a line of
JSON: `status` (negative: the signal that ended it) and `seconds`.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status (negative: by that signal), its time, and what it printed."""

    status: int
    seconds: float
    output: str


class Starter:
    """The forking process, for tests."""

    def __init__(self, log: Path) -> None:
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def run(
        self,
        argv: list[str],
        kill_after: float | None = None,
        signal_: int = signal.SIGKILL,
        **environment: str,
    ) -> Ended:
        """Run a command to its end, or to the signal that it gets after so many seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.log.write_text("")
        asked = {"argv": argv, "log": str(self.log), "kill_after": kill_after, "signal": int(signal_)}
        self._process.stdin.write(json.dumps(asked | {"environment": environment}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        output = self.log.read_text(encoding="utf-8", errors="replace")
        return Ended(answer["status"], answer["seconds"], output)


def _child(asked: dict[str, Any]) -> None:
    """The command itself; never returns."""
    log = os.open(asked["log"], os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.environ |= asked["environment"]
    tempfile.tempdir = None  # which is chosen on first use, by the environment of then
    # As a terminal would start it: a job in the background inherits that Ctrl-C is ignored.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        from qtale_lightning.__main__ import main

        main(asked["argv"])
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, seconds: float | None) -> int | None:
    """The wait status of a child, or None where it is still at work after so many seconds."""
    if seconds is None:
        return os.waitpid(child, 0)[1]
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    return None


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print on import is no answer
    # Everything that a command imports on its way, so that none imports it again; nothing that starts a thread.
    for module in ("cli", "report", "stages", "quantization.options"):
        importlib.import_module(f"qtale_lightning.{module}")
    importlib.import_module("torch").set_num_threads(1)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        if (child := os.fork()) == 0:
            _child(asked)
        status = _wait(child, asked["kill_after"])
        if status is None:
            os.kill(child, asked["signal"])
            status = _wait(child, None)
        assert status is not None
        answer = {"status": os.waitstatus_to_exitcode(status), "seconds": time.perf_counter() - started}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
