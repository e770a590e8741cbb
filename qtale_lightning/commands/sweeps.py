"""The commands of sweeps over runs, in W&B's format: ``sweep start|join|trial|table``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from jsonargparse.typing import PositiveInt

from qtale_lightning.experiments import find
from qtale_lightning.files import replacing
from qtale_lightning.values import UserPath

if TYPE_CHECKING:
    from qtale_lightning.launching import Launcher
    from qtale_lightning.sweeps.definition import SweepDefinition
    from qtale_lightning.sweeps.trial import Trial


def start(
    file: UserPath,
    options: tuple[str, ...],
    local: bool = False,
    launch: str = "local",
    jobs: PositiveInt | None = None,
    count: PositiveInt | None = None,
    seed: int = 0,
    wandb_project: str = "qtale",
) -> int:
    """A whole sweep: registered on W&B's server, with an agent here; or run here without a server.

    The file's variables (MODEL, DATA, OUT, …) come from the environment. What stands behind -- goes to every run.

    Args:
        file: A sweep file, in W&B's format.
        local: Without W&B's server.
        launch: Where runs are started: local, or a cluster's file of experiments/launch (without W&B's server).
        jobs: Runs at a time; by default one a GPU, one on a CPU (without W&B's server).
        count: The most runs; by default the file's run_cap.
        seed: Of a random sweep's draws (local only).
        wandb_project: W&B project.
    """
    from qtale_lightning.launching import launcher
    from qtale_lightning.sweeps.definition import read_sweep
    from qtale_lightning.sweeps.points import points
    from qtale_lightning.sweeps.trial import Trial

    sweep = read_sweep(find(file)).resolved(os.environ, options)
    if not local and launch == "local":
        return _start_remote(sweep, Trial.parse(sweep.arguments({})).to, wandb_project, count)
    trials = [Trial.parse(sweep.arguments(point)) for point in points(sweep, seed, count)]
    return run_trials(sweep, trials, launcher(launch, jobs, trials[0].to / "jobs"))


def join(sweep: str, count: PositiveInt | None = None) -> int:
    """An agent for a sweep that was started elsewhere, in the same commit.

    Args:
        sweep: Its entity/project/id.
        count: The most runs of this agent.
    """
    from qtale_lightning.sweeps import remote

    return remote.join(sweep, count)


def trial(options: tuple[str, ...]) -> int:
    """One run of a sweep: what agents call, with --to=FOLDER STAGES ARGUMENTS… -- --key=value …

    The command that reproduces it alone comes first in its output.
    """
    from qtale_lightning.launching import Local
    from qtale_lightning.sweeps import remote
    from qtale_lightning.sweeps.trial import Trial

    one = Trial.parse(options)
    print(f"this run alone: {one}", flush=True)
    Local(into_logs=False).run([one.job()])
    record = one.record()
    if record is None or record["status"] != "finished":
        return 1
    if one.stages != ("fit",) and os.environ.get("WANDB_SWEEP_ID"):
        remote.log_outcome(record, one.folder)
    return 0


def table(folder: UserPath) -> None:
    """The table and figure of what has run, from the runs' own records.

    Args:
        folder: The sweep's, such as outputs/sweeps/lambda2-tiny-facts-s0.
    """
    from qtale_lightning.sweeps.table import write_table
    from qtale_lightning.yaml_files import read_yaml

    kept = Path(folder) / "sweep.yaml"
    name = read_yaml(kept)["name"] if kept.is_file() else Path(folder).name
    print(write_table(Path(folder), name))


def run_trials(sweep: SweepDefinition, trials: list[Trial], launch: Launcher) -> int:
    """Runs the trials that aren't finished, and writes the table of all; the exit status."""
    from qtale_lightning.launching.job import console

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
    from qtale_lightning.launching.job import console
    from qtale_lightning.sweeps import remote

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
    from qtale_lightning.launching.job import console
    from qtale_lightning.sweeps.table import write_table

    try:
        print(write_table(folder, name))
    except FileNotFoundError as error:
        console.print(str(error))
