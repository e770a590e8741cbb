"""The benchmark's side of an engine's process: start it, ask it, stop it."""

import json
import os
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent.parent
PAUSE = 0.05  # seconds before a request: threads of the engine that ran before still wait for work a while
LAST_LINES = 6


class Failed(Exception):
    """An engine's process ended, or said what it shouldn't; the last lines of its errors."""


class Process:
    """A running engine; a context manager that ends it.

    Args:
        python: The interpreter of the engine's environment.
        module: Of this package, with :func:`peer.serve.serve` as its main.
        config: Its first line.
        environment: Variables over ours.

    Raises:
        Failed: It didn't load.
    """

    def __init__(
        self, python: Path, module: str, config: dict[str, Any], environment: dict[str, str]
    ) -> None:
        path = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [str(python), "-m", module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | environment,
        )  # fmt: skip
        self.says = self._answer(json.dumps(config))

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def ask(self, request: str) -> dict[str, Any]:
        """The answer to a request, `decode` or `prompt`."""
        time.sleep(PAUSE)
        return self._answer(request)

    def _answer(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(line, file=self._process.stdin, flush=True)
            said = self._process.stdout.readline()
        except BrokenPipeError:
            said = ""
        if not said:
            status = self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()[-LAST_LINES:]
            self.__exit__()
            raise Failed(f"its process ended with status {status}: " + " / ".join(lines))
        answer: dict[str, Any] = json.loads(said)
        return answer
