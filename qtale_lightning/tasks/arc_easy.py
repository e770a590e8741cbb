"""ARC-Easy: grade-school science, the easier questions."""

from qtale_lightning.tasks import fields, wording
from qtale_lightning.tasks.registry import register
from qtale_lightning.tasks.task import HubSource, Task

register(
    Task(
        name="arc_easy",
        title="ARC-e",
        metric="acc_norm",
        rows=2251,
        hub=HubSource("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453", "ARC-Easy"),
        parse=fields.lettered("arc_easy", "question"),
        cloze=wording.cloze,
        choice=wording.choice,
    )
)
