"""Jobs on a cluster: commands that are ready are submitted together, as a job array, and watched."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from qtale_lightning.files import replacing
from qtale_lightning.launching.job import Command, Job, Steps, console, following
from qtale_lightning.launching.processes import ending_on_sigterm
from qtale_lightning.launching.settings import ClusterSettings
from qtale_lightning.locks import locked

if TYPE_CHECKING:
    from submitit import AutoExecutor
    from submitit.core.core import Job as Submitted

POLL = 2.0
"""Seconds between two looks at what has ended."""

PATIENCE = 10.0
"""Seconds that an exit status may be seen later than that a job has ended."""

LOST = 1
"""Exit status of a command whose job ended without saying any: cancelled, out of memory, its machine gone."""


class Cluster:
    """A launcher that submits commands through submitit, and waits for them.

    The folder holds what submitit writes, and ``submitted.json``: which command is which of the cluster's jobs. Where
    this process is killed, they go on, and the same command as before watches them again. Ctrl-C and SIGTERM cancel
    them, so that what ran saves what it resumes from.

    Args:
        folder: One that the cluster's machines see, too. One process at a time launches from it.
        jobs: Jobs that run at a time; by default what the settings say.
    """

    def __init__(self, settings: ClusterSettings, folder: Path, jobs: int | None = None) -> None:
        self._settings, self._folder = settings, folder
        self._at_once = jobs or settings.at_once

    @property
    def at_once(self) -> int:
        """Jobs that run at a time."""
        return self._at_once

    def run(self, jobs: Sequence[Job]) -> None:
        """All jobs to their end; a command that fails stops no other job.

        Raises:
            KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM; what was submitted is cancelled.
            ValueError: There is no such cluster here, or it refuses what the settings ask for.
        """
        if not jobs:
            return
        with locked(self._folder, "python -m qtale_lightning", console.print), ExitStack() as begun:
            submissions = _Submissions(self._folder.resolve(), self._settings, self._at_once)
            of_folder: dict[Path, list[Job]] = {}
            for job in jobs:
                of_folder.setdefault(job.folder, []).append(job)
            every = [begun.enter_context(closing(_in_turn(same))) for same in of_folder.values()]
            ready = [(steps, command) for steps in every if (command := next(steps, None)) is not None]
            with ending_on_sigterm(), submissions.cancelled_if_stopped():
                while ready or submissions.watched:
                    submissions.add(ready)
                    ended = submissions.ended()
                    ready = [
                        (steps, command)
                        for steps, status in ended
                        if (command := following(steps, status)) is not None
                    ]
                    if not ended:
                        time.sleep(POLL)


def _in_turn(jobs: Sequence[Job]) -> Steps:
    """Of jobs on one folder, of which only one can be at work."""
    for job in jobs:
        yield from job.steps()


@dataclass
class _Watched:
    """A command that was submitted, of steps that wait for its exit status."""

    steps: Steps
    command: Command
    job: Submitted[None]
    status: Path

    def succeeded(self) -> bool:
        """Whether it has ended, and well."""
        return self.status.is_file() and self.status.read_text(encoding="utf-8") == "0"


class _Submissions:
    """The cluster's jobs of one launcher, and the record of them that the next one finds."""

    def __init__(self, folder: Path, settings: ClusterSettings, at_once: int) -> None:
        self.watched: list[_Watched] = []
        self._folder, self._settings = folder, settings
        self._file = folder / "submitted.json"
        self._known: dict[str, dict[str, str]] = (
            json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}
        )
        self._executor = self._made_executor(at_once)

    def _made_executor(self, at_once: int) -> AutoExecutor:
        import submitit  # here, since it is needed on clusters alone

        cluster = self._settings.cluster
        limit: Any = {f"{cluster}_max_num_timeout": self._settings.resumes}
        try:
            executor = submitit.AutoExecutor(self._folder / "submitit", cluster, **limit)
        except RuntimeError as error:
            raise ValueError(
                f"there is no {cluster} here ({error}): start this on a machine that has it"
            ) from error
        executor.update_parameters(**self._settings.parameters("qtale", at_once))
        return executor

    def add(self, ready: Sequence[tuple[Steps, Command]]) -> None:
        """Watches what another process submitted, and submits the rest as one array."""
        from qtale_lightning.launching.work import Work

        anew = []
        for steps, command in ready:
            one = self._found(steps, command)
            if one is not None:
                console.print(f"job {one.job.job_id} is there already: {shlex.join(command.arguments)}")
                self.watched.append(one)
            else:
                anew.append((steps, command, self._folder / f"{uuid4().hex}.status"))
        if not anew:
            return
        works = [
            Work(command.arguments, str(command.log.resolve()), str(status)) for _, command, status in anew
        ]
        try:
            jobs = self._executor.submit_array(works)
        except RuntimeError as error:
            raise ValueError(
                f"{self._settings.cluster} refused the jobs (experiments/launch): {error}"
            ) from error
        for (steps, command, status), job in zip(anew, jobs, strict=True):
            self.watched.append(_Watched(steps, command, job, status))
            self._known[_key(command)] = {"job": job.job_id, "status": str(status)}
        self._keep()
        console.print(f"submitted: {', '.join(job.job_id for job in jobs)}")

    def _found(self, steps: Steps, command: Command) -> _Watched | None:
        """A command's job of before, where it has ended well or hasn't ended."""
        entry = self._known.get(_key(command))
        if entry is None or self._settings.cluster == "local":  # whose jobs only their own process can watch
            return None
        from submitit.slurm.slurm import SlurmJob

        one = _Watched(steps, command, SlurmJob(self._executor.folder, entry["job"]), Path(entry["status"]))
        return one if one.succeeded() or not one.job.done(force_check=True) else None

    def ended(self) -> list[tuple[Steps, int]]:
        """What isn't watched any more, with its exit status."""
        ended = [one for one in self.watched if one.succeeded() or one.job.done()]
        for one in ended:
            self.watched.remove(one)
            self._known.pop(_key(one.command), None)
        statuses = [(one.steps, _status(one)) for one in ended]
        if ended:
            self._keep()
        return statuses

    @contextmanager
    def cancelled_if_stopped(self) -> Iterator[None]:
        """Cancels what is watched where the block ends by an exception."""
        try:
            yield
        except BaseException:
            for one in self.watched:
                one.job.cancel(check=False)
            self._known.clear()
            self._keep()
            raise

    def _keep(self) -> None:
        with replacing(self._file) as temporary:
            temporary.write_text(json.dumps(self._known, indent=1) + "\n", encoding="utf-8")


def _key(command: Command) -> str:
    return shlex.join(command.arguments)


def _status(one: _Watched) -> int:
    """A command's exit status; other machines' files may be seen a little late."""
    deadline = time.monotonic() + PATIENCE
    while not one.status.is_file():
        if time.monotonic() > deadline:
            return LOST
        time.sleep(min(1.0, PATIENCE))
    status = int(one.status.read_text(encoding="utf-8"))
    one.status.unlink()
    return status
