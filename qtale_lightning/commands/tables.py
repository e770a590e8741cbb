"""The commands of declared tables: ``table`` and ``figures``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse.typing import NonNegativeInt, PositiveInt

from qtale_lightning.commands.parser import PROG
from qtale_lightning.experiments import find
from qtale_lightning.options import run_parser, with_files, without_lightnings
from qtale_lightning.tasks import built_in
from qtale_lightning.values import Numbers, UserPath

if TYPE_CHECKING:
    from qtale_lightning.tables.request import Asked

_OUT = UserPath("outputs")


def table(
    name: str,
    options: tuple[str, ...],
    *,
    model: str,
    seeds: Numbers[NonNegativeInt] = Numbers((0,)),  # noqa: B008 (a tuple)
    out: UserPath = _OUT,
    plan: bool = False,
    launch: str = "local",
    jobs: PositiveInt | None = None,
) -> None:
    """A declared table: what is missing is run, what is there is used again.

    Its options of a run are for every run; --data.tasks, by default facts, for the lines that name no tasks.

    Args:
        name: A table of experiments/tables, or a file like them.
        model: A model of experiments/models.
        seeds: One run of every line for each, joined by commas.
        out: The runs' folder.
        plan: Only say what would run, and about how long.
        launch: Where runs are started: local, or a cluster's file of experiments/launch.
        jobs: Runs at a time; by default 1, or what the cluster's file says.
    """
    asked = requested(name, options, model, seeds, out, plan, launch, jobs)

    from qtale_lightning.tables.command import table

    table(asked)


def figures(
    name: str,
    options: tuple[str, ...],
    *,
    model: str,
    seeds: Numbers[NonNegativeInt] = Numbers((0,)),  # noqa: B008 (a tuple)
    out: UserPath = _OUT,
) -> None:
    """Figures of a table's finished runs, from what the table measured.

    Args:
        name: A table of experiments/tables, or a file like them.
        model: A model of experiments/models.
        seeds: As of the table, joined by commas.
        out: The runs' folder.
    """
    asked = requested(name, options, model, seeds, out)

    from qtale_lightning.tables.command import figures

    figures(asked)


def requested(
    name: str,
    options: tuple[str, ...],
    model: str,
    seeds: Sequence[int],
    out: str,
    plan: bool = False,
    launch: str = "local",
    jobs: int | None = None,
) -> Asked:
    """What is asked of a table, which is found by its name or is a file."""
    from qtale_lightning.tables.declaration import FOLDER
    from qtale_lightning.tables.request import Asked, Request

    file = find(name if name.endswith(".yaml") else FOLDER / f"{name}.yaml")
    request = Request(model, _tasks(options), tuple(dict.fromkeys(seeds)), Path(out), options)
    return Asked(file, request, plan, launch, 1 if launch == "local" and jobs is None else jobs)


def _tasks(options: Sequence[str]) -> str:
    parser = run_parser(PROG)
    parser.set_defaults({"data.tasks": built_in()[0]})
    tasks = parser.parse_args(without_lightnings(with_files(options)))["data"]["tasks"]
    return tasks if isinstance(tasks, str) else ",".join(tasks)
