"""One run of a sweep: its folder and commands, from the arguments that an agent gives."""

import json
import re
import shlex
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from os.path import expanduser
from pathlib import Path
from typing import Any

from qtale_lightning.files import replacing
from qtale_lightning.launching import Command, Job, Steps
from qtale_lightning.launching.job import console
from qtale_lightning.sweeps.outcome import outcome

RECORD = "trial.json"
STRAY = "_wandb"
"""A key that some versions of W&B's agent add to the parameters."""

LONGEST = 100
"""Characters of a folder's name."""

STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)
"""Exit statuses of a command that was told to end."""


@dataclass(frozen=True)
class Trial:
    """A point of a sweep, and what is run for it.

    Attributes:
        to: The sweep's folder.
        stages: What is run, one after the other: `fit`, or stages of a finished run.
        fixed: Their arguments that all trials share; a finished run is the first of them.
        parameters: The point's, as they were written.
    """

    to: Path
    stages: tuple[str, ...]
    fixed: tuple[str, ...]
    parameters: dict[str, str]

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> "Trial":
        """From ``--to=FOLDER STAGE[,STAGE…] ARGUMENTS… -- --key=value …``.

        Raises:
            ValueError: They aren't of that form; the message names the argument.
        """
        usage = "trial --to=FOLDER fit|STAGE,STAGE… ARGUMENTS… -- --key=value …"
        own, _, given = _split(arguments)
        if len(own) < 2 or not own[0].startswith("--to=") or own[1].startswith("-"):
            raise ValueError(f"a trial is called as: {usage}")
        stages, fixed = tuple(own[1].split(",")), tuple(map(expanduser, own[2:]))
        if stages != ("fit",) and (not fixed or fixed[0].startswith("-")):
            raise ValueError(f"name the finished run that {own[1]} works on: {usage}")
        parameters = {}
        for argument in given:
            name, equals, value = argument.removeprefix("--").partition("=")
            if not argument.startswith("--") or not equals:
                raise ValueError(f"the sweep's argument {argument!r} isn't of the form --key=value")
            if name != STRAY:
                parameters[name] = "null" if value == "None" else value  # as YAML says it
        return cls(Path(own[0].removeprefix("--to=")).expanduser(), stages, fixed, parameters)

    @property
    def label(self) -> str:
        """The name of its folder: its parameters, by the last part of every key where that is unambiguous."""
        last = [name.rpartition(".")[2] for name in self.parameters]
        names = last if len(set(last)) == len(last) else list(self.parameters)
        values = [value.removeprefix("[").removesuffix("]") for value in self.parameters.values()]
        exact = ",".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        safe = re.sub(r"[^\w.,=+-]", "", exact)[:LONGEST] or "defaults"
        # What the name had to leave out tells it from others by a hash.
        return safe if safe == exact else f"{safe}-{sha256(exact.encode()).hexdigest()[:6]}"

    @property
    def folder(self) -> Path:
        """Its own, in the sweep's."""
        return self.to / self.label

    def commands(self) -> list[list[str]]:
        """Arguments of `python -m qtale_lightning`, a list for every stage; each reproduces its part alone."""
        given = [f"--{name}={value}" for name, value in self.parameters.items()]
        if self.stages == ("fit",):
            return [["fit", *self.fixed, f"--out={self.folder}", *given]]
        return [[stage, *self.fixed, *given] for stage in self.stages]

    def __str__(self) -> str:
        """The command that does all of it."""
        return " && ".join(
            shlex.join(["python", "-m", "qtale_lightning", *command]) for command in self.commands()
        )

    def run_directory(self) -> Path | None:
        """Where its results are, once there are any."""
        if self.stages != ("fit",):
            return Path(self.fixed[0])
        return next((file.parent for file in sorted(self.folder.glob("*/results.json"))), None)

    def record(self) -> dict[str, Any] | None:
        """What was kept of it, if it was started by the same command before."""
        try:
            kept = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return kept if kept["command"] == str(self) else None

    def finished(self) -> bool:
        """Whether it needs no further run."""
        kept = self.record()
        return kept is not None and kept["status"] == "finished"

    def check(self) -> None:
        """Refuse stages of a run that isn't there (ValueError)."""
        if self.stages != ("fit",) and not (Path(self.fixed[0]) / "config.yaml").is_file():
            raise ValueError(f"{self.fixed[0]} is no run: it has no config.yaml. `make train` makes one.")

    def job(self) -> Job:
        """What isn't finished, to be launched.

        Trials that work on one run wait for each other, since all of them write its results.

        Raises:
            ValueError: as `check`.
        """
        self.check()
        folder = self.folder if self.stages == ("fit",) else Path(self.fixed[0])
        return Job(folder, "a trial of a sweep", self._steps)

    def _steps(self) -> Steps:
        """Its commands, and a record of how they ended: status, seconds, and what was measured."""
        if self.finished():
            return
        started, said = time.time(), "stopped"
        log = self.folder / "log.txt"
        console.print(f"{self.label}, log in {log}:")
        console.print(f"  {self}")
        self._keep("running", 0.0)
        try:
            for command in self.commands():
                status = yield Command(tuple(command), log)
                if status:
                    said = "stopped" if status in STOPPED else f"failed ({status})"
                    return
            said = "finished"
        finally:
            seconds = time.time() - started
            self._keep(said, seconds)
            console.print(f"{self.label}: {said} in {seconds:.0f} s")

    def _keep(self, status: str, seconds: float) -> None:
        run = self.run_directory()
        measured = outcome(run, self.commands()[-1]) if status == "finished" and run else []
        record = {
            "parameters": self.parameters,
            "command": str(self),
            "run": str(run) if run else None,
            "status": status,
            "seconds": seconds,
            "outcome": measured,
        }
        with replacing(self.folder / RECORD) as temporary:
            temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _split(arguments: Sequence[str]) -> tuple[list[str], str, list[str]]:
    at = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:at]), "--", list(arguments[at + 1 :])
