"""What a cluster's job does: one command of the suite, whose exit status it leaves in a file."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from submitit.helpers import DelayedSubmission

from qtale_lightning.files import replacing
from qtale_lightning.launching.processes import Processes

OF_THE_CLUSTER = ("SLURM_", "SUBMITIT_", "SRUN_", "PMI")
"""Variables that a command doesn't see: by them, Lightning would take it for one of several tasks of the job."""


@dataclass
class Work:
    """A command. This is all that is pickled for a job; what it leaves is read as text.

    Attributes:
        log: The file that its output is appended to.
        status: The file for its exit status.
    """

    arguments: tuple[str, ...]
    log: str
    status: str
    _processes: Processes = field(default_factory=Processes, repr=False)

    def __call__(self) -> None:
        """Runs it to its end."""
        hidden = {name: None for name in os.environ if name.startswith(OF_THE_CLUSTER)}
        # In a thread: `checkpoint` is called by a signal's handler, and must be able to wait for the same process.
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(self._processes.run, self.arguments, Path(self.log), None, hidden)
            try:
                ended = running.result()
            except BaseException:
                self._processes.stop()
                raise
        with replacing(Path(self.status)) as temporary:
            temporary.write_text(str(ended), encoding="utf-8")

    def checkpoint(self) -> DelayedSubmission:
        """Called shortly before the job's time is over, or where it gives way to another: the run saves what it resumes
        from, and the same work is queued again."""
        self._processes.stop()
        return DelayedSubmission(Work(self.arguments, self.log, self.status))

    def __getstate__(self) -> dict[str, object]:
        """Without what belongs to a process."""
        return {"arguments": self.arguments, "log": self.log, "status": self.status}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _processes=Processes())
