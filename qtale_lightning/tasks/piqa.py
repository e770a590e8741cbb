"""PIQA: which of two ways reaches a goal."""

from qtale_lightning.tasks import fields, wording
from qtale_lightning.tasks.registry import register
from qtale_lightning.tasks.task import HubSource, Question, Row, Task


def _parse(row: Row) -> Question:
    choices = (fields.text(row, "sol1"), fields.text(row, "sol2"))
    return Question("piqa", fields.text(row, "goal"), choices, fields.index(row, "label", ("0", "1")))


register(
    Task(
        name="piqa",
        title="PIQA",
        metric="acc_norm",
        rows=16113,
        hub=HubSource("baber/piqa", "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1"),
        parse=_parse,
        cloze=wording.cloze,
        choice=wording.choice,
    )
)
