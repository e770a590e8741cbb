"""The commonsense tasks: one declaration each, and the readers of their rows.

A row keeps the field names of its Hugging Face dataset, whether it comes from the hub or from a local JSON
Lines file, so that one `parse` serves both. It becomes a `Question`, which knows of no prompt.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Row = Mapping[str, Any]
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Question:
    """One multiple-choice question.

    Attributes:
        task: Name of its task.
        text: The question, or the sentence with one blank `_` (winogrande).
        choices: Text of each choice, as the dataset has it.
        label: Index of the right choice.
        context: What it refers to (boolq's passage, social_iqa's situation); empty where there is none.
    """

    task: str
    text: str
    choices: tuple[str, ...]
    label: int
    context: str = ""


@dataclass(frozen=True)
class HubSource:
    """A dataset on the Hugging Face hub that loads without a script.

    `revision` pins a commit or a tag. None reads the hub's current version, and is recorded as such in the
    protocol of every result.
    """

    path: str
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    validation: str = "validation"


@dataclass(frozen=True)
class Task:
    """Declaration of one task.

    Attributes:
        name: Name in configurations and folder name of its local files.
        metric: The accuracy that the task reports: `acc`, or the length-normalised `acc_norm`.
        parse: Turns a row into a `Question`; raises `ValueError` that names the malformed field.
        hub: Where its rows are on the hub; None for the built-in task.
    """

    name: str
    metric: Literal["acc", "acc_norm"]
    parse: Callable[[Row], Question]
    hub: HubSource | None


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field '{field}': expected text, got {value!r}")
    return value


def _index(row: Row, field: str, values: Sequence[str]) -> int:
    """Position of a field's value among the values that it may have."""
    value = str(row.get(field)).strip()
    if value not in values:
        raise ValueError(f"field '{field}': expected one of {', '.join(values)}, got {row.get(field)!r}")
    return values.index(value)


def _parse_piqa(row: Row) -> Question:
    choices = (_text(row, "sol1"), _text(row, "sol2"))
    return Question("piqa", _text(row, "goal"), choices, _index(row, "label", ("0", "1")))


def _parse_boolq(row: Row) -> Question:
    """`answer` is a bool in google/boolq; SuperGLUE's copy has `label`, 0 or 1. The passage is optional."""
    if "answer" in row:
        if not isinstance(row["answer"], bool):
            raise ValueError(f"field 'answer': expected true or false, got {row['answer']!r}")
        label = int(row["answer"])
    elif "label" in row:
        label = _index(row, "label", ("0", "1"))
    else:
        raise ValueError("field 'answer': missing (and so is 'label')")
    passage = _text(row, "passage") if row.get("passage") is not None else ""
    return Question("boolq", _text(row, "question"), ("no", "yes"), label, passage)


def _parse_social_iqa(row: Row) -> Question:
    choices = tuple(_text(row, field) for field in ("answerA", "answerB", "answerC"))
    label = _index(row, "label", ("1", "2", "3"))
    return Question("social_iqa", _text(row, "question"), choices, label, _text(row, "context"))


def _parse_winogrande(row: Row) -> Question:
    sentence = _text(row, "sentence")
    if sentence.count("_") != 1 or not sentence.partition("_")[2].strip():
        raise ValueError(f"field 'sentence': expected one blank '_' and text after it, got {sentence!r}")
    choices = (_text(row, "option1"), _text(row, "option2"))
    return Question("winogrande", sentence, choices, _index(row, "answer", ("1", "2")))


def _parse_lettered(task: str, text_field: str) -> Callable[[Row], Question]:
    """ARC and OpenBookQA: `choices` holds parallel lists of texts and labels ("A".."E" or "1".."5")."""

    def parse(row: Row) -> Question:
        choices = row.get("choices")
        if not isinstance(choices, Mapping):
            raise ValueError(f"field 'choices': expected lists 'text' and 'label', got {choices!r}")
        texts, labels = choices.get("text"), choices.get("label")
        if not isinstance(texts, list) or len(texts) < 2:
            raise ValueError(f"field 'choices.text': expected a list of two texts or more, got {texts!r}")
        if any(not isinstance(text, str) or not text.strip() for text in texts):
            raise ValueError(f"field 'choices.text': expected texts, got {texts!r}")
        if not isinstance(labels, list) or [type(label) for label in labels] != [str] * len(texts):
            raise ValueError(f"field 'choices.label': expected {len(texts)} labels, got {labels!r}")
        return Question(task, _text(row, text_field), tuple(texts), _index(row, "answerKey", labels))

    return parse


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("piqa", "acc_norm", _parse_piqa, HubSource("baber/piqa")),
        Task("boolq", "acc", _parse_boolq, HubSource("google/boolq")),
        Task("social_iqa", "acc", _parse_social_iqa, HubSource("lighteval/siqa")),
        Task(
            "arc_easy",
            "acc_norm",
            _parse_lettered("arc_easy", "question"),
            HubSource("allenai/ai2_arc", "ARC-Easy"),
        ),
        Task(
            "arc_challenge",
            "acc_norm",
            _parse_lettered("arc_challenge", "question"),
            HubSource("allenai/ai2_arc", "ARC-Challenge"),
        ),
        Task("winogrande", "acc", _parse_winogrande, HubSource("allenai/winogrande", "winogrande_xl")),
        Task(
            "openbookqa",
            "acc_norm",
            _parse_lettered("openbookqa", "question_stem"),
            HubSource("allenai/openbookqa", "main"),
        ),
        Task("facts", "acc", _parse_lettered("facts", "question"), hub=None),
    )
}

SUITES: dict[str, tuple[str, ...]] = {
    "csqa": ("piqa", "boolq", "social_iqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa"),
}


def resolve_tasks(spec: str | Sequence[str]) -> tuple[str, ...]:
    """Task names of a task, a suite, a list of them, or a comma-separated string; each name once, in order.

    Raises:
        ValueError: A name is unknown, or none is given.
    """
    parts = [spec] if isinstance(spec, str) else list(spec)
    names: dict[str, None] = {}
    for name in (name.strip() for part in parts for name in part.split(",")):
        if name not in TASKS and name not in SUITES:
            known = ", ".join([*SUITES, *TASKS])
            raise ValueError(f"unknown task {name!r} (--data.tasks); known suites and tasks: {known}")
        names.update(dict.fromkeys(SUITES.get(name, (name,))))
    if not names:
        raise ValueError(
            f"no task given (--data.tasks); known suites and tasks: {', '.join([*SUITES, *TASKS])}"
        )
    return tuple(names)


def read_local(task: str, root: str | Path, split: Split) -> list[Question]:
    """Questions of `<root>/<task>/<split>.jsonl`, one JSON object a line; blank lines are skipped.

    Raises:
        FileNotFoundError: The file isn't there.
        ValueError: A row is malformed; names file, line and field.
    """
    path = Path(root) / task / f"{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found: --data.root must be a folder with <task>/train.jsonl and "
            f"<task>/validation.jsonl for each task; without --data.root, rows come from the Hugging Face hub"
        )
    with path.open(encoding="utf-8") as lines:
        numbered = [(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    return _parse_rows(task, ((place, _decode(place, line)) for place, line in numbered))


def read_hub(task: str, split: Split) -> list[Question]:
    """Questions of a task's hub dataset, downloaded or from the local Hugging Face cache.

    Raises:
        ConnectionError: The hub can't be reached and the dataset isn't cached; says what to do.
        ValueError: A row is malformed; names dataset, row number and field.
    """
    from datasets import load_dataset

    source = TASKS[task].hub
    if source is None:
        raise ValueError(f"task {task!r} is built in and has no hub dataset")
    name = source.train if split == "train" else source.validation
    try:
        rows = load_dataset(source.path, source.config, split=name, revision=source.revision)
    except ConnectionError as error:
        raise ConnectionError(
            f"the rows of task {task!r} ({source.path} on the Hugging Face hub) can't be downloaded and "
            f"aren't in the local cache: {error}. Connect to the hub, or pass --data.root FOLDER with files "
            f"FOLDER/{task}/train.jsonl and FOLDER/{task}/validation.jsonl (one row a line, in the dataset's "
            f"own field names), or choose the built-in --data.tasks facts, which needs neither."
        ) from error
    return _parse_rows(task, ((f"{source.path}[{name}]:{number}", row) for number, row in enumerate(rows, 1)))


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
