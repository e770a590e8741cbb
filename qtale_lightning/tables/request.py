"""What the command line asks of a table; read before anything heavy is imported."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from qtale_lightning.tables.declaration import FOLDER


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
    plan_only: bool = False
    launch: str = "local"
    jobs: int | None = 1

    def command(self, name: str) -> str:
        """The command line that asks for it, by ``table`` or ``figures``."""
        asked, table = (
            self.request,
            self.file.stem if self.file.parent.name == FOLDER.name else str(self.file),
        )
        own = ["--model", asked.model, "--seeds", ",".join(map(str, asked.seeds))]
        line = ["python", "-m", "qtale_lightning", name, table, *own, "--out", str(asked.out), *asked.options]
        return shlex.join(line)
