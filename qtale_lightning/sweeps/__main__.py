"""The command line: ``python -m qtale_lightning.sweeps start|join|trial|table``."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from qtale_lightning import errors
from qtale_lightning.experiments import find
from qtale_lightning.files import replacing
from qtale_lightning.launching import Launcher, Local, launcher
from qtale_lightning.launching.job import console
from qtale_lightning.sweeps import remote
from qtale_lightning.sweeps.definition import SweepDefinition, read_sweep
from qtale_lightning.sweeps.points import points
from qtale_lightning.sweeps.table import write_table
from qtale_lightning.sweeps.trial import Trial
from qtale_lightning.yaml_files import read_yaml

USAGE = """usage: python -m qtale_lightning.sweeps <command> …

  start FILE [--local] [--jobs N] [--count N] [--seed N] [--project NAME] [-- OPTIONS]
                    register FILE, in W&B's format, on its server and run an agent; or run it here without a server.
                    Its variables (MODEL, DATA, OUT, …) come from the environment; OPTIONS go to every run
  join SWEEP [--count N]
                    an agent for a sweep that was started elsewhere (entity/project/id), in the same commit
  trial --to=FOLDER STAGES ARGUMENTS… -- --key=value …
                    one run of a sweep: what agents call
  table FOLDER      the table and figure of what has run, from the runs' own records
"""


def start(arguments: list[str]) -> int:
    """A whole sweep."""
    parser = argparse.ArgumentParser("python -m qtale_lightning.sweeps start", allow_abbrev=False)
    parser.add_argument("file", type=Path, help="sweep file")
    parser.add_argument("--local", action="store_true", help="without W&B's server")
    parser.add_argument(
        "--launch",
        default="local",
        help="local, or a cluster's file of experiments/launch (without W&B's server)",
    )
    parser.add_argument(
        "--jobs", type=int, help="runs at a time; by default one a GPU, one on a CPU (without W&B's server)"
    )
    parser.add_argument("--count", type=int, help="the most runs; by default the file's run_cap")
    parser.add_argument("--seed", type=int, default=0, help="of a random sweep's draws (local only)")
    parser.add_argument("--project", default="qtale", help="W&B project")
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own, options = parser.parse_args(arguments[:at]), arguments[at + 1 :]
    if own.count is not None and own.count < 1:
        raise ValueError(f"--count {own.count} must be at least 1 (COUNT=… of make)")
    sweep = read_sweep(find(own.file)).resolved(os.environ, options)
    if not own.local and own.launch == "local":
        folder = Trial.parse(sweep.arguments({})).to
        return _start_remote(sweep, folder, own.project, own.count)
    trials = [Trial.parse(sweep.arguments(point)) for point in points(sweep, own.seed, own.count)]
    return run_trials(sweep, trials, launcher(own.launch, own.jobs, trials[0].to / "jobs"))


def run_trials(sweep: SweepDefinition, trials: list[Trial], launch: Launcher) -> int:
    """Runs the trials that aren't finished, and writes the table of all; the exit status."""
    folder = trials[0].to
    waiting = [trial.job() for trial in trials if not trial.finished()]
    _keep_definition(sweep, folder)
    console.print(
        f"{len(trials)} runs, {len(trials) - len(waiting)} of them finished; {launch.at_once} at a time"
    )
    try:
        launch.run(waiting)
    except (KeyboardInterrupt, SystemExit) as stopped:
        console.print("stopped; the same command goes on from here")
        _table_of_what_is_there(folder, sweep.name)
        return int(stopped.code or 0) if isinstance(stopped, SystemExit) else 130
    failed = [trial for trial in trials if not trial.finished()]
    for trial in failed:
        console.print(f"failed: {trial.label}, alone by:")
        console.print(f"  {trial}")
    _table_of_what_is_there(folder, sweep.name)
    return 1 if failed else 0


def _start_remote(sweep: SweepDefinition, folder: Path, project: str, count: int | None) -> int:
    path = remote.create(sweep, project)
    _keep_definition(sweep, folder)
    console.print(f"sweep {path}; on another machine: make sweep SWEEP={path}")
    try:
        return remote.join(path, count)
    finally:
        _table_of_what_is_there(folder, sweep.name)


def _keep_definition(sweep: SweepDefinition, folder: Path) -> None:
    """What ran, resolved: ``wandb sweep`` takes this file, too."""
    with replacing(folder / "sweep.yaml") as temporary:
        text = yaml.safe_dump(sweep.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True)
        temporary.write_text(text, encoding="utf-8")


def _table_of_what_is_there(folder: Path, name: str) -> None:
    try:
        print(write_table(folder, name))
    except FileNotFoundError as error:
        console.print(str(error))


def join(arguments: list[str]) -> int:
    """An agent."""
    parser = argparse.ArgumentParser("python -m qtale_lightning.sweeps join", allow_abbrev=False)
    parser.add_argument("sweep", help="entity/project/id")
    parser.add_argument("--count", type=int, help="the most runs of this agent")
    own = parser.parse_args(arguments)
    return remote.join(own.sweep, own.count)


def trial(arguments: list[str]) -> int:
    """One run, for an agent; the command that reproduces it alone comes first."""
    one = Trial.parse(arguments)
    print(f"this run alone: {one}", flush=True)
    Local(into_logs=False).run([one.job()])
    record = one.record()
    if record is None or record["status"] != "finished":
        return 1
    if one.stages != ("fit",) and os.environ.get("WANDB_SWEEP_ID"):
        remote.log_outcome(record, one.folder)
    return 0


def table(arguments: list[str]) -> int:
    """The table and figure of a sweep's folder."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ValueError("table takes the folder of a sweep: table outputs/sweeps/lambda2-…")
    folder = Path(arguments[0]).expanduser()
    kept = folder / "sweep.yaml"
    name = read_yaml(kept)["name"] if kept.is_file() else folder.name
    print(write_table(folder, name))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "start": start,
    "join": join,
    "trial": trial,
    "table": table,
}


def _run(argv: list[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        print(USAGE)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    return COMMANDS[argv[0]](argv[1:])


def main(argv: list[str]) -> int:
    """The exit status of a command; what goes wrong ends in one message (:mod:`qtale_lightning.errors`)."""
    return errors.run(_run, argv, goes_on=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
