"""OpenBookQA: elementary science; a stem is the beginning of a sentence that the choice ends."""

from qtale_lightning.tasks import fields, wording
from qtale_lightning.tasks.registry import register
from qtale_lightning.tasks.task import HubSource, Task

register(
    Task(
        name="openbookqa",
        title="OBQA",
        metric="acc_norm",
        rows=4957,
        hub=HubSource("allenai/openbookqa", "388097ea7776314e93a529163e0fea805b8a6454", "main"),
        parse=fields.lettered("openbookqa", "question_stem"),
        cloze=wording.each_choice(lambda question: question.text),
        choice=wording.choice,
    )
)
