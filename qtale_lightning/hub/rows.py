"""Rows of a dataset on the hub."""

from pathlib import Path
from typing import TYPE_CHECKING

from qtale_lightning.hub.download import snapshot
from qtale_lightning.hub.errors import (
    HubError,
    explained,
    first_line,
    is_of_the_network,
    paragraph,
    reason_of,
    root,
)
from qtale_lightning.hub.repository import Repository

if TYPE_CHECKING:
    from datasets import Dataset


def read_dataset(repository: Repository, config: str | None, split: str) -> "Dataset":
    """A split of a dataset, read from its files at a commit.

    (`datasets` itself reads the newest copy that it finds where the hub can't be reached, whatever was asked for.)

    Args:
        repository: Its revision is a commit.
        config: Name of a configuration, whose files are `<config>/<split>-*`; None where there is one only.
        split: Its name, or a slice of it as `datasets` writes it: "train[:-2000]".

    Raises:
        HubError: It can't be had, or isn't there; the message says what to do.
    """
    folder = snapshot(repository, [f"{config}/*" if config else "*", "README.md", "*.py"])
    from datasets import load_dataset  # here, since it takes a second
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from datasets.utils import disable_progress_bars

    disable_progress_bars()  # of rewriting rows that are there: one for every split of every task
    name = split.partition("[")[0]
    files = {name: f"{config}/{name}-*"} if config else None
    with explained(repository):
        try:
            return load_dataset(str(folder), data_files=files, split=split)
        except (DatasetsError, FileNotFoundError, RuntimeError, ValueError) as error:
            if isinstance(error.__cause__, OSError):  # of writing its cache
                raise error.__cause__ from error
            if isinstance(error, DatasetGenerationError):
                reason = f"its files can't be read ({first_line(error.__cause__ or error)})"
                mend = f"If their download was damaged, remove {folder} and run the same command again."
            else:
                reason, mend = _absent(error, folder, config, split), ""
            raise HubError(paragraph(repository, reason, mend)) from error


def _absent(error: Exception, folder: Path, config: str | None, split: str) -> str:
    """What is missing, in words."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    rows = [file for file in found if not file.endswith((".md", ".py")) and not file.startswith(".")]
    if (scripts := [file for file in found if file.endswith(".py")]) and not rows:
        return f"it is published as a loading script ({', '.join(scripts)}), and those aren't run"
    if config and not rows:
        return f"it has no configuration {config!r}"
    if isinstance(error, FileNotFoundError) or "split" in str(error):
        return f"it has no split {split!r}" + (f" of {config!r}" if config else "") + f" ({', '.join(rows)})"
    return first_line(error)


def reason_without(error: BaseException) -> str | None:
    """Why `datasets` itself couldn't load a dataset of the hub, and what to do; None if that isn't what happened."""
    from datasets.exceptions import DatasetsError

    cause = root(error)
    name = getattr(cause, "repo_id", None)
    if name is not None or is_of_the_network(cause):
        repository = Repository(name or "", "dataset", "main", "", "")
        reason, mend = reason_of(repository, cause)
        return f"{name}: {reason}. {mend}" if name else f"{reason}. {mend}"
    text = first_line(error)
    if "scripts are no longer supported" in text:
        return (
            f"a dataset is published as a loading script ({text.rpartition(' ')[2]}), and those aren't run."
        )
    if isinstance(error, DatasetsError | ConnectionError | FileNotFoundError) or "BuilderConfig" in text:
        return f"{text}."
    return None
