"""The commands ``table`` and ``figures``: a declaration, what is missing of it, and what is made from it."""

import logging
from collections.abc import Mapping
from pathlib import Path

from qtale_lightning.launching import Launcher, launcher
from qtale_lightning.report.terminal import print_page
from qtale_lightning.tables.content import content
from qtale_lightning.tables.declaration import load_declaration
from qtale_lightning.tables.execution import Executor, console
from qtale_lightning.tables.figures import write_figures
from qtale_lightning.tables.progress import Estimate, about, estimate
from qtale_lightning.tables.publish import publish
from qtale_lightning.tables.render import failures, write_table
from qtale_lightning.tables.request import Asked
from qtale_lightning.tables.rows import Command
from qtale_lightning.tables.runs import known_runs
from qtale_lightning.tables.table import Table


def table(given: Asked, launch: Launcher | None = None) -> None:
    """Run what a table is missing, and write it.

    Args:
        launch: Stands in for what the arguments ask for, in tests.

    Raises:
        SystemExit: 1 where a cell failed; the table is there nevertheless.
    """
    asked = _table(given)
    missing = asked.missing()
    _say_plan(asked, missing)
    if given.plan_only:
        return
    launch = launch or launcher(given.launch, given.jobs, _folder(asked) / "jobs")
    executor = Executor(_folder(asked) / "logs", _estimate(asked), launch)
    try:
        executor.execute(asked.stages, asked.demands, missing)
    except SystemExit:
        console.print("stopped; the same command goes on where this one was")
        raise
    found = content(asked, given.command("table"), executor.failures)
    before = _read(_folder(asked) / "table.json")
    page, *_ = write_table(found, _folder(asked))
    if _read(_folder(asked) / "table.json") != before:
        publish(found, _folder(asked), asked.request.options)
    print_page(page.read_text(encoding="utf-8"), console)
    if failed := failures(found):
        console.print(f"{len(failed)} cells failed:")
        console.print("\n".join(f"  {line}" for line in failed))
        raise SystemExit(1)


def figures(given: Asked) -> None:
    """Figures of a table, from those of its runs that are there.

    Raises:
        FileNotFoundError: None is.
    """
    asked = _table(given)
    there = [run for run in asked.runs if run.finished]
    if not there:
        raise FileNotFoundError(
            f"{asked.request.out} has no finished run of this table: `make table TABLE={asked.name}` makes them"
        )
    if len(there) < len(asked.runs):
        console.print(
            f"{len(asked.runs) - len(there)} of {len(asked.runs)} runs aren't there, and are left out"
        )
    for path in write_figures(asked, _folder(asked) / "figures", given.command("figures")):
        console.print(str(path))


def _table(asked: Asked) -> Table:
    # Lightning's line of a seed: once for every run's options.
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    return Table(asked.file.stem, load_declaration(asked.file), asked.request)


def _folder(asked: Table) -> Path:
    """Where a table goes. Its files say which seeds it has."""
    data = asked.request.data
    if all(line.data for line in asked.lines):
        data = "+".join(dict.fromkeys(data for line in asked.lines for data in line.data))
    return asked.request.out / "tables" / f"{asked.name}-{asked.request.model}-{data.replace(',', '+')}"


def _estimate(asked: Table) -> Estimate:
    return estimate(asked.request.model, list(known_runs(asked.request.out).values()))


def _say_plan(asked: Table, missing: Mapping[Path, list[Command]]) -> None:
    commands = [command for found in missing.values() for command in found]
    to_train = sum(command.kind == "fit" for command in commands)
    finished = sum(run.finished for run in asked.runs)
    base = " and ".join(map(str, asked.base))
    console.print(f"table {asked.name}, {asked.request.model}, on {base}:")
    console.print(
        f"{len(asked.lines)} lines of {len(asked.runs)} runs, {finished} there and {to_train} to train",
    )
    if not commands:
        console.print("nothing is missing")
        return
    expected = _estimate(asked)
    console.print(
        f"{len(commands)} commands to run, {len(commands) - to_train} of them on finished runs; about "
        f"{about(expected.seconds(commands))} ({expected.source})",
    )


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
