"""What is launched: jobs, each of which says command after command what is to run next."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console

# Plain text: what rich would take for its markup may stand in any value.
console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Command:
    """Arguments of ``python -m qtale_lightning``, and the file that its output is appended to."""

    arguments: tuple[str, ...]
    log: Path


Steps = Generator[Command, int, None]
"""Yields commands, and is sent the exit status of each; closed early where it is stopped."""


@dataclass(frozen=True)
class Job:
    """Commands on one run, one after the other.

    Attributes:
        folder: Locked while they run, where they run here; another process's work in it is waited for.
        title: What is at work, for others' messages.
        steps: Begins anew; what is there already isn't asked for again.
    """

    folder: Path
    title: str
    steps: Callable[[], Steps]


def following(steps: Steps, status: int) -> Command | None:
    """The command after one that ended with this status; None after the last."""
    try:
        return steps.send(status)
    except StopIteration:
        return None


class Launcher(Protocol):
    """Runs jobs."""

    @property
    def at_once(self) -> int:
        """Jobs that run at a time."""

    def run(self, jobs: Sequence[Job]) -> None:
        """All jobs to their end.

        Raises:
            KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM; what ran was stopped so that it resumes.
        """
