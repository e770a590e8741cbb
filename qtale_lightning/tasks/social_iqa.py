"""Social IQa: what people in a situation feel, want or do."""

from qtale_lightning.tasks import fields, wording
from qtale_lightning.tasks.registry import register
from qtale_lightning.tasks.task import HubSource, Question, Row, Task


def _parse(row: Row) -> Question:
    choices = tuple(fields.text(row, field) for field in ("answerA", "answerB", "answerC"))
    label = fields.index(row, "label", ("1", "2", "3"))
    situation = fields.text(row, "context")
    return Question("social_iqa", fields.text(row, "question"), choices, label, situation)


register(
    Task(
        name="social_iqa",
        title="SIQA",
        metric="acc",
        rows=33410,
        hub=HubSource("lighteval/siqa", "54c6a1f8cb6daf4f5abf24a601852612fb35eb25"),
        parse=_parse,
        cloze=wording.each_choice(lambda question: f"Q: {question.context} {question.text}\nA:"),
        choice=wording.choice,
    )
)
