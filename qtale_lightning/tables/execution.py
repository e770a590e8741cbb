"""Running a table's commands, one after the other, as processes of their own."""

import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from qtale_lightning.errors import HINT
from qtale_lightning.locks import locked, passing
from qtale_lightning.tables.progress import Estimate, clock
from qtale_lightning.tables.rows import Command, Demand, missing_commands
from qtale_lightning.tables.runs import TableRun

# Plain text: what rich would take for its markup may stand in any value.
console = Console(markup=False, highlight=False, soft_wrap=True)

Start = Callable[[Sequence[str], Path, int | None], int]
"""Runs a command line with a log file and a held lock, and returns its exit status."""
Demands = Callable[[TableRun], list[Demand]]


def start_process(arguments: Sequence[str], log: Path, lock: int | None) -> int:
    """`python -m qtale_lightning <arguments>`, its output appended to `log`; ended with this process.

    The process inherits the lock of its run: where this process is killed, the other still holds the lock until it is
    done, and a new start waits for it.
    """
    with log.open("a", encoding="utf-8") as output:
        output.write(f"$ python -m qtale_lightning {shlex.join(arguments)}\n")
        output.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", "qtale_lightning", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            **passing(lock),
        )
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


@dataclass
class Executor:
    """Runs what is missing, says how far it is, and keeps what failed.

    Attributes:
        failures: By run folder: what failed first.
    """

    logs: Path
    estimate: Estimate
    start: Start = start_process
    failures: dict[Path, str] = field(default_factory=dict)
    done: int = 0
    _started: float = 0.0

    def execute(
        self, runs: Sequence[TableRun], demands: Demands, planned: Mapping[Path, list[Command]]
    ) -> None:
        """Every run in turn; a failed command leaves the run's other commands and all other runs their chance.

        Args:
            runs: All of the table.
            demands: What is asked of a run, as far as is known by then.
            planned: The commands that were missing at the start: to say how many are left.
        """
        self._started = time.perf_counter()
        later = dict(planned)
        for run in runs:
            if later.pop(run.directory.root, None) is None and not missing_commands(run, demands(run)):
                continue
            with locked(run.directory.root, "python -m qtale_lightning table", _say) as lock:
                self._finish(run, demands, [c for commands in later.values() for c in commands], lock)

    def _finish(self, run: TableRun, demands: Demands, later: Sequence[Command], lock: int | None) -> None:
        """All that a run is missing; it is asked anew after each command, since it depends on what was measured."""
        tried: set[tuple[str, ...]] = set()
        broken: set[str] = set()  # engines that couldn't quantize: nothing of theirs can be evaluated
        while missing := [
            command
            for command in missing_commands(run, demands(run))
            if command.arguments not in tried and command.engine not in broken
        ]:
            command = missing[0]
            tried.add(command.arguments)
            left = self.estimate.seconds([*missing, *later])
            console.print(
                f"[{self.done + 1}/{self.done + len(missing) + len(later)}] {command.says}: "
                f"{clock(time.perf_counter() - self._started)} so far, about {clock(left)} left",
            )
            status = self._run(command, lock)
            self.done += 1
            if status != 0 and command.kind == "fit":
                break
            if status != 0 and command.kind == "quantize":
                broken.add(command.engine)

    def _run(self, command: Command, lock: int | None) -> int:
        root = command.run.directory.root
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{root.parent.name}-{root.name}-{command.kind}.log"
        started = time.perf_counter()
        status = self.start(command.arguments, log, lock)
        if status == 0:
            self.estimate.learn(command, time.perf_counter() - started)
        else:
            reason = f"{command.kind} ended with status {status}: {_last_error(log)} (see {log})"
            console.print(f"  failed: {reason}")
            self.failures.setdefault(root, reason)
        return status


def _say(what: str) -> None:
    console.print(what, markup=False)


def _last_error(log: Path) -> str:
    """The last line of a log that names an error, or else the last one."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    lines = [line.strip() for line in lines if line.strip() and line.strip() != HINT]
    named = [line for line in lines if line.startswith("error:")]
    return (named or lines or ["it said nothing"])[-1]
