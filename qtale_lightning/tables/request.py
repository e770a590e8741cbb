"""What the command line asks of a table; read before anything heavy is imported."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path

from qtale_lightning.experiments import find, names
from qtale_lightning.tables.declaration import FOLDER
from qtale_lightning.tasks import built_in


@dataclass(frozen=True)
class Request:
    """What the command line asks of a table.

    Attributes:
        data: Tasks of the lines that name none.
        options: For every run, as on `fit`'s command line.
    """

    model: str
    data: str
    seeds: tuple[int, ...]
    out: Path
    options: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """A table's declaration, what is asked of it, and how: whether only to say what that would run, where to launch it
    (see :func:`~qtale_lightning.launching.launcher`), and how many runs at a time."""

    file: Path
    request: Request
    plan_only: bool
    launch: str
    jobs: int | None


def parse(command: str, arguments: Sequence[str]) -> Asked:
    """The arguments of ``table`` or ``figures``.

    Raises:
        SystemExit: They can't be understood, or ask for help.
        ValueError: A value that can't be.
    """
    parser = argparse.ArgumentParser(
        f"python -m qtale_lightning {command}",
        allow_abbrev=False,
        description="Other options are those of `fit`, for every run of the table.",
    )
    parser.add_argument(
        "name", help=f"a table of {FOLDER} ({', '.join(names('tables'))}), or a file like them"
    )
    parser.add_argument("--model", required=True, help="a model of experiments/models")
    parser.add_argument("--data", default=built_in()[0], help="tasks of the cells that name none")
    parser.add_argument("--seeds", default="0", help="seeds joined by commas")
    parser.add_argument("--out", type=expanduser, default="outputs", help="the runs' folder")
    parser.add_argument("--launch", default="local", help="local, or a cluster's file of experiments/launch")
    parser.add_argument(
        "--jobs", type=int, help="runs at a time; by default 1, or what the cluster's file says"
    )
    parser.add_argument("--plan", action="store_true", help="only say what would run, and about how long")
    own, options = parser.parse_known_args(list(arguments))
    try:
        seeds = tuple(dict.fromkeys(int(seed) for seed in own.seeds.split(",")))
    except ValueError:
        raise ValueError(f"--seeds {own.seeds}: give numbers joined by commas, such as 0,1,2") from None
    file = find(own.name if own.name.endswith(".yaml") else FOLDER / f"{own.name}.yaml")
    request = Request(own.model, own.data, seeds, Path(own.out), tuple(options))
    jobs = 1 if own.launch == "local" and own.jobs is None else own.jobs
    return Asked(file, request, own.plan, own.launch, jobs)
