"""Starts, watches, resumes and stops the runs of tables and sweeps, on this machine or on a cluster."""

from pathlib import Path

from qtale_lightning.launching.cluster import Cluster
from qtale_lightning.launching.job import Command, Job, Launcher, Steps
from qtale_lightning.launching.local import Local, device_slots
from qtale_lightning.launching.settings import ClusterSettings

__all__ = ["Cluster", "Command", "Job", "Launcher", "Local", "Steps", "launcher"]


def launcher(name: str, jobs: int | None, folder: Path) -> Launcher:
    """Where runs are started.

    Args:
        name: ``local``, or a cluster's file of experiments/launch.
        jobs: Runs at a time; by default one a GPU or one on a CPU, or what the cluster's file says.
        folder: For what a cluster's jobs leave: their submission, output and exit status.

    Raises:
        ValueError: `jobs` isn't positive, or the cluster's file is wrong.
        FileNotFoundError: There is no such file.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs {jobs} must be at least 1 (JOBS=… of make)")
    if name == "local":
        return Local(device_slots(jobs))
    return Cluster(ClusterSettings.read(name), folder, jobs)
