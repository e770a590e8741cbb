"""How the stages show that they work: the console and progress bars with the time left."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Plain text: what rich would take for its markup may stand in any path or name.
console = Console(markup=False)


@contextmanager
def progress(description: str, total: int) -> Iterator[Any]:
    """A progress bar with the time left; yields the function that advances it."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count=1: bar.advance(task, count)
