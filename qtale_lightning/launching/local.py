"""Jobs on this machine: one after the other, or several at once where there are devices for them."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from qtale_lightning.launching.job import Job, console, following
from qtale_lightning.launching.processes import Processes, ending_on_sigterm
from qtale_lightning.locks import locked

Start = Callable[[Sequence[str], Path | None, int | None], int]
"""Runs a command with a log file and under a held lock, and returns its exit status."""
Slot = Mapping[str, str]
"""Variables of a process: the device that it may use."""


class Local:
    """A launcher that has as many jobs at once as there are slots.

    Args:
        slots: One for each job that runs at a time.
        start: Stands in for processes, in tests.
        into_logs: Whether commands' output goes into their logs; else where this process's goes.
    """

    def __init__(
        self, slots: Sequence[Slot] = ({},), start: Start | None = None, into_logs: bool = True
    ) -> None:
        self._slots, self._start, self._into_logs = slots, start, into_logs

    @property
    def at_once(self) -> int:
        """Jobs that run at a time."""
        return len(self._slots)

    def run(self, jobs: Sequence[Job]) -> None:
        """All jobs to their end, in their order; a command that fails stops no other job.

        Raises:
            KeyboardInterrupt, SystemExit: Ctrl-C or SIGTERM; what ran was stopped so that it resumes.
        """
        processes, free = Processes(), SimpleQueue[Slot]()
        for slot in self._slots:
            free.put(slot)

        def work(job: Job) -> None:
            with _taken(free) as slot:
                if not processes.stopped:
                    start = self._start or partial(processes.run, environment=slot)
                    self._finish(job, start, processes)

        with ending_on_sigterm():
            if len(self._slots) == 1:
                for job in jobs:
                    work(job)
                return
            with ThreadPoolExecutor(len(self._slots)) as pool:
                try:
                    for _ in pool.map(work, jobs):
                        pass
                except BaseException:
                    processes.stop()
                    pool.shutdown(cancel_futures=True)
                    raise

    def _finish(self, job: Job, start: Start, processes: Processes) -> None:
        """A job's commands under its folder's lock; none follows one that was stopped."""
        with locked(job.folder, job.title, console.print) as lock, closing(job.steps()) as steps:
            command = next(steps, None)
            while command is not None:
                status = start(command.arguments, command.log if self._into_logs else None, lock)
                if processes.stopped and status != 0:
                    return  # it didn't fail
                command = following(steps, status)


@contextmanager
def _taken(free: "SimpleQueue[Slot]") -> Iterator[Slot]:
    slot = free.get()
    try:
        yield slot
    finally:
        free.put(slot)


def device_slots(jobs: int | None) -> list[dict[str, str]]:
    """One job a GPU, or one on a CPU; several share the devices in turn, and a CPU's cores. A single one has all."""
    if jobs == 1:
        return [{}]
    import torch

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
