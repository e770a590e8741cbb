"""Rows of a task as questions: from local JSON Lines files, the Hugging Face hub, or the built-in generator."""

import json
from collections.abc import Iterable
from pathlib import Path

from qtale_lightning.data.facts import generate_facts
from qtale_lightning.data.parsing import Question, Row
from qtale_lightning.data.tasks import TASKS, Split


def read(task: str, root: str | None, split: Split, seed: int) -> list[Question]:
    """Questions of a split, in the source's order. `seed` is that of built-in questions.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as `read_local` and `read_hub`.
    """
    if TASKS[task].hub is None:
        return generate_facts(split, seed)
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
    with path.open(encoding="utf-8") as lines:
        numbered = [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    return _parse_rows(task, ((place, _decode(place, line)) for place, line in numbered))


def local_file(task: str, root: str | Path, split: Split) -> Path:
    """Where the rows of a split are expected."""
    return Path(root) / task / f"{split}.jsonl"


def read_hub(task: str, split: Split) -> list[Question]:
    """Questions of a task's hub dataset, downloaded or from the local Hugging Face cache.

    Raises:
        ConnectionError: The hub can't be reached and the dataset isn't cached; says what to do.
        ValueError: A row is malformed; names dataset, row number and field. Or the task has no such split.
    """
    from datasets import load_dataset

    source = TASKS[task].hub
    if source is None:
        raise ValueError(f"task {task!r} is built in and has no hub dataset")
    name = source.split(split)
    if name is None:
        raise ValueError(f"task {task!r} has no {split} split on the hub")
    try:
        rows = load_dataset(source.path, source.config, split=name, revision=source.revision)
    except ConnectionError as error:
        raise ConnectionError(
            f"the rows of task {task!r} ({source.path} on the Hugging Face hub) can't be downloaded and "
            f"aren't in the local cache: {error}. Connect to the hub, or pass --data.root FOLDER with files "
            f"FOLDER/{task}/train.jsonl and FOLDER/{task}/validation.jsonl (one row a line, in the dataset's "
            f"own field names), or choose the built-in --data.tasks facts, which needs neither."
        ) from error
    numbered = ((f"{source.path}[{name}]:{number}", row) for number, row in enumerate(rows, 1))
    field = source.skip_empty
    return _parse_rows(task, (pair for pair in numbered if field is None or (pair[1][field] or "").strip()))


def _decode(place: str, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not a JSON object: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: not a JSON object: {line.strip()[:80]}")
    return row


def _parse_rows(task: str, rows: Iterable[tuple[str, Row]]) -> list[Question]:
    questions = []
    for place, row in rows:
        try:
            questions.append(TASKS[task].parse(row))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if not questions:
        raise ValueError(f"no rows for task {task!r}")
    return questions
