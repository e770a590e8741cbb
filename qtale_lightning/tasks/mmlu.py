"""MMLU: questions of 57 subjects, always asked by choice, in lm-evaluation-harness's words."""

from collections.abc import Sequence
from string import ascii_uppercase

from qtale_lightning.tasks import fields, wording
from qtale_lightning.tasks.registry import register
from qtale_lightning.tasks.task import HubSource, Question, Row, Task


def _parse(row: Row) -> Question:
    """`answer` is an index or a letter. `subject` is empty in the hub's auxiliary training rows."""
    choices = row.get("choices")
    if not isinstance(choices, list) or [type(choice) for choice in choices] != [str] * 4:
        raise ValueError(f"field 'choices': expected four texts, got {fields.shown(choices)}")
    subject = row.get("subject")
    if not isinstance(subject, str):
        raise ValueError(f"field 'subject': expected text, got {fields.shown(subject)}")
    values = ascii_uppercase[:4] if str(row.get("answer")).strip().isalpha() else "0123"
    label = fields.index(row, "answer", tuple(values))
    question = fields.text(row, "question").strip()
    return Question("mmlu", question, tuple(choices), label, subject=subject.strip())


def _header(question: Question) -> str:
    about = f" about {question.subject.replace('_', ' ')}" if question.subject else ""
    return f"The following are multiple choice questions (with answers){about}.\n\n"


def _choice(question: Question, labels: Sequence[str]) -> str:
    return f"{question.text}\n{wording.options(question, labels)}\nAnswer:"


register(
    Task(
        name="mmlu",
        title="MMLU",
        metric="acc",
        rows=99842,
        hub=HubSource(
            "cais/mmlu",
            "c30699e8356da336a370243923dbaf21066bb9fe",
            "all",
            train="auxiliary_train",
            validation="test",
            calibration="validation",  # auxiliary_train has no subjects
            dev="dev",
        ),
        parse=_parse,
        choice=_choice,
        header=_header,
        template="choice, as lm-evaluation-harness's mmlu",
    )
)
