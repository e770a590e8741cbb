"""A sweep without W&B's server: the same trials, several at once where there are devices for them."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from queue import SimpleQueue

from rich.console import Console

from qtale_lightning.sweeps.processes import Processes
from qtale_lightning.sweeps.trial import Trial

# Plain text: what rich would take for its markup may stand in any value.
console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


def run_locally(trials: Sequence[Trial], slots: Sequence[dict[str, str]]) -> list[Trial]:
    """Runs the trials that aren't finished; returns those that failed.

    Args:
        slots: Environment of each trial that runs at a time: the device that it may use.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; what ran was stopped so that it resumes, and what is done is kept.
    """
    waiting = [trial for trial in trials if not trial.finished()]
    console.print(
        f"{len(trials)} runs, {len(trials) - len(waiting)} of them finished; {len(slots)} at a time"
    )
    processes, free = Processes(), SimpleQueue[dict[str, str]]()
    for slot in slots:
        free.put(slot)

    def work(trial: Trial) -> str:
        slot = free.get()
        try:
            if processes.stopped:
                return "stopped"
            console.print(f"{trial.label}, log in {trial.folder / 'log.txt'}:")
            console.print(f"  {trial}")
            log = trial.folder / "log.txt"
            record = trial.run(lambda command, lock: processes.run(command, slot, log, lock))
            console.print(f"{trial.label}: {record['status']} in {record['seconds']:.0f} s")
            return str(record["status"])
        finally:
            free.put(slot)

    with processes.stopping_on_signals(), ThreadPoolExecutor(len(slots)) as pool:
        jobs: dict[Future[str], Trial] = {pool.submit(work, trial): trial for trial in waiting}
        try:
            for _ in as_completed(jobs):
                pass
        except KeyboardInterrupt:
            processes.stop()
            pool.shutdown(cancel_futures=True)
            raise
        return [trial for job, trial in jobs.items() if job.result() != "finished"]


def device_slots(jobs: int | None) -> list[dict[str, str]]:
    """One trial a GPU, or one on a CPU; ``jobs`` trials share the devices in turn, and a CPU's cores.

    Raises:
        ValueError: ``jobs`` isn't positive.
    """
    import torch

    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs {jobs} must be at least 1 (JOBS=… of make)")
    gpus = _visible(torch.cuda.device_count())
    count = jobs or max(1, len(gpus))
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(count)]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    return [{} if count == 1 else {"OMP_NUM_THREADS": threads} for _ in range(count)]


def _visible(count: int) -> list[str]:
    """Names of the GPUs that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(i) for i in range(count)]
