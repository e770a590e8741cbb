"""What a table is missing, as jobs: a run each, whose commands follow from what was measured before."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from qtale_lightning.errors import HINT
from qtale_lightning.launching import Command as Start
from qtale_lightning.launching import Job, Launcher, Steps
from qtale_lightning.tables.progress import Estimate, clock
from qtale_lightning.tables.rows import Command, Demand, missing_commands
from qtale_lightning.tables.runs import TableRun

# Plain text: what rich would take for its markup may stand in any value.
console = Console(markup=False, highlight=False, soft_wrap=True)

Demands = Callable[[TableRun], list[Demand]]


@dataclass
class Executor:
    """Runs what is missing, says how far it is, and keeps what failed.

    Attributes:
        failures: By run folder: what failed first.
    """

    logs: Path
    estimate: Estimate
    launcher: Launcher
    failures: dict[Path, str] = field(default_factory=dict)
    done: int = 0
    _started: float = field(default_factory=time.perf_counter)
    _later: dict[Path, list[Command]] = field(default_factory=dict)

    def execute(
        self,
        stages: Sequence[Sequence[TableRun]],
        demands: Demands,
        planned: Mapping[Path, list[Command]],
    ) -> None:
        """Every run; a failed command leaves the run's other commands and all other runs their chance.

        Args:
            stages: All runs of the table; those of a stage begin when those of the one before have ended.
            demands: What is asked of a run, as far as is known by then.
            planned: The commands that were missing at the start: to say how many are left.
        """
        self._later = dict(planned)
        for stage in stages:
            jobs = [
                Job(
                    run.directory.root,
                    "python -m qtale_lightning table",
                    lambda run=run: self._steps(run, demands),  # type: ignore[misc]
                )
                for run in stage
                if run.directory.root in planned or missing_commands(run, demands(run))
            ]
            self.launcher.run(jobs)

    def _steps(self, run: TableRun, demands: Demands) -> Steps:
        """All that a run is missing; it is asked anew after each command, since it depends on what was measured."""
        self._later.pop(run.directory.root, None)
        if run.begun is not None and not run.begun.finished:
            reason = f"{run.begun.directory.root}, with which it begins, isn't finished"
            console.print(f"  failed: {run.directory.root}: {reason}")
            self.failures.setdefault(run.directory.root, reason)
            return
        tried: set[tuple[str, ...]] = set()
        broken: set[str] = set()  # engines that couldn't quantize: nothing of theirs can be evaluated
        while missing := [
            command
            for command in missing_commands(run, demands(run))
            if command.arguments not in tried and command.engine not in broken
        ]:
            command = missing[0]
            tried.add(command.arguments)
            self._say(command, missing)
            root, started = run.directory.root, time.perf_counter()
            log = self.logs / f"{root.parent.name}-{root.name}-{command.kind}.log"
            status = yield Start(command.arguments, log)
            self.done += 1
            if status == 0:
                self.estimate.learn(command, time.perf_counter() - started)
                continue
            reason = f"{command.kind} ended with status {status}: {_last_error(log)} (see {log})"
            console.print(f"  failed: {reason}")
            self.failures.setdefault(root, reason)
            if command.kind == "fit":
                break
            if command.kind == "quantize":
                broken.add(command.engine)

    def _say(self, command: Command, missing: Sequence[Command]) -> None:
        left = [*missing, *(later for commands in self._later.values() for later in commands)]
        seconds = self.estimate.seconds(left) / self.launcher.at_once
        console.print(
            f"[{self.done + 1}/{self.done + len(left)}] {command.says}: "
            f"{clock(time.perf_counter() - self._started)} so far, about {clock(seconds)} left",
        )


def _last_error(log: Path) -> str:
    """The last line of a log that names an error, or else the last one."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    lines = [line.strip() for line in lines if line.strip() and line.strip() != HINT]
    named = [line for line in lines if line.startswith("error:")]
    return (named or lines or ["it said nothing"])[-1]
