"""WinoGrande: which of two fills a sentence's blank."""

from collections.abc import Sequence

from qtale_lightning.tasks import fields, wording
from qtale_lightning.tasks.registry import register
from qtale_lightning.tasks.task import HubSource, Question, Row, Task


def _parse(row: Row) -> Question:
    sentence = fields.text(row, "sentence")
    if sentence.count("_") != 1 or not sentence.partition("_")[2].strip():
        raise ValueError(
            f"field 'sentence': expected one blank '_' and text after it, got {fields.shown(sentence)}"
        )
    choices = (fields.text(row, "option1"), fields.text(row, "option2"))
    return Question("winogrande", sentence, choices, fields.index(row, "answer", ("1", "2")))


def _partial_evaluation(question: Question) -> Sequence[tuple[str, str]]:
    """Each choice fills the blank of its context, and the text after the blank is scored."""
    before, _, after = question.text.partition("_")
    return [(before + choice, after.strip()) for choice in question.choices]


def _choice(question: Question, labels: Sequence[str]) -> str:
    return wording.choice(question, labels, "Fill in the blank")


register(
    Task(
        name="winogrande",
        title="WinoGrande",
        metric="acc",
        rows=40398,
        hub=HubSource("allenai/winogrande", "01e74176c63542e6b0bcb004dcdea22d94fb67b5", "winogrande_xl"),
        parse=_parse,
        cloze=_partial_evaluation,
        choice=_choice,
        blank=True,
    )
)
