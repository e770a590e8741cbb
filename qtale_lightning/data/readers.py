"""Rows of a task as questions: from local JSON Lines files, the Hugging Face hub, or made by the task itself."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from qtale_lightning.data.lines import read_rows
from qtale_lightning.hub.repository import Repository
from qtale_lightning.tasks import TASKS, Question, Row, Split, built_in


def read(task: str, root: str | None, split: Split, seed: int) -> list[Question]:
    """Questions of a split, in the source's order. `seed` is that of built-in questions.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as `read_local` and `read_hub`.
    """
    if (generate := TASKS[task].generate) is not None:
        return generate(split, seed)
    return read_hub(task, split) if root is None else read_local(task, root, split)


def read_local(task: str, root: str | Path, split: Split) -> list[Question]:
    """Questions of `<root>/<task>/<split>.jsonl`, one JSON object a line; blank lines are skipped.

    Raises:
        FileNotFoundError: The file isn't there.
        ValueError: A row is malformed; names file, line and field.
    """
    path = local_file(task, root, split)
    if not path.is_file():
        few_shot = f"\n{path} holds the examples of --data.shots." if split == "dev" else ""
        raise FileNotFoundError(
            f"{path} not found: --data.root must be a folder with <task>/train.jsonl and "
            f"<task>/validation.jsonl for each task; without --data.root, rows come from the Hugging Face "
            f"hub{few_shot}"
        )
    return _parse_rows(task, read_rows(path))


def local_file(task: str, root: str | Path, split: Split) -> Path:
    """Where the rows of a split are expected."""
    return Path(root) / task / f"{split}.jsonl"


def read_hub(task: str, split: Split) -> list[Question]:
    """Questions of a task's hub dataset at its commit, downloaded or from the local Hugging Face cache.

    Raises:
        HubError: They can't be had, or a dataset isn't what its declaration says; says what to do.
        ValueError: A row is malformed; names dataset, row number and field. Or the task has no such split.
    """
    source = TASKS[task].hub
    if source is None:
        raise ValueError(
            f"task {task!r} has no hub dataset: "
            + ("its rows are built in" if TASKS[task].generate else "give its rows by --data.root FOLDER")
        )
    name = source.split(split)
    if name is None:
        raise ValueError(f"task {task!r} has no {split} split on the hub")
    from qtale_lightning.hub.errors import HubError, paragraph  # here, since local rows need no hub
    from qtale_lightning.hub.rows import read_dataset

    repository = Repository(
        source.path,
        "dataset",
        source.revision,
        f"the rows of task {task!r}",
        f"Or pass --data.root FOLDER with files FOLDER/{task}/train.jsonl and FOLDER/{task}/validation.jsonl (one row "
        f"a line, in the dataset's own field names), or choose the built-in --data.tasks {' or '.join(built_in())}, "
        "which needs neither.",
    )
    rows = read_dataset(repository, source.config, name)
    if missing := [column for column in source.required if column not in rows.column_names]:
        columns = f"it has no column {missing[0]!r} (only {', '.join(rows.column_names)})"
        raise HubError(paragraph(repository, columns, ""))
    numbered = ((f"{source.path}[{name}]:{number}", row) for number, row in enumerate(rows, 1))
    field = source.skip_empty
    return _parse_rows(
        task,
        (pair for pair in numbered if field is None or (pair[1][field] or "").strip()),
        source.required,
    )


def _parse_rows(task: str, rows: Iterable[tuple[str, Row]], required: Sequence[str] = ()) -> list[Question]:
    questions = []
    for place, row in rows:
        try:
            for field in required:
                if row[field] is None:
                    raise ValueError(f"field '{field}': missing")
            questions.append(TASKS[task].parse(row))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if not questions:
        raise ValueError(f"no rows for task {task!r}")
    return questions
