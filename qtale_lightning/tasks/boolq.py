"""BoolQ: a yes-or-no question on a passage."""

from collections.abc import Sequence
from dataclasses import replace

from qtale_lightning.tasks import fields, wording
from qtale_lightning.tasks.registry import register
from qtale_lightning.tasks.task import HubSource, Question, Row, Task


def _parse(row: Row) -> Question:
    """`answer` is a bool in google/boolq; SuperGLUE's copy has `label`, 0 or 1. The passage is optional."""
    if "answer" in row:
        if not isinstance(row["answer"], bool):
            raise ValueError(f"field 'answer': expected true or false, got {fields.shown(row['answer'])}")
        label = int(row["answer"])
    elif "label" in row:
        label = fields.index(row, "label", ("0", "1"))
    else:
        raise ValueError("field 'answer': missing (and so is 'label')")
    passage = fields.text(row, "passage") if row.get("passage") is not None else ""
    return Question("boolq", fields.text(row, "question"), ("no", "yes"), label, passage)


def _marked(question: Question) -> Question:
    """Questions come without a question mark, and get one."""
    return replace(question, text=f"{question.text.rstrip().removesuffix('?')}?")


def _cloze(question: Question) -> Sequence[tuple[str, str]]:
    return wording.cloze(_marked(question))


def _choice(question: Question, labels: Sequence[str]) -> str:
    return wording.choice(_marked(question), labels)


register(
    Task(
        name="boolq",
        title="BoolQ",
        metric="acc",
        rows=9427,
        # Without its passage a question is another task.
        hub=HubSource("google/boolq", "35b264d03638db9f4ce671b711558bf7ff0f80d5", required=("passage",)),
        parse=_parse,
        cloze=_cloze,
        choice=_choice,
    )
)
