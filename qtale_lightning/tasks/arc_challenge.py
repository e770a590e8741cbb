"""ARC-Challenge: grade-school science, the harder questions."""

from qtale_lightning.tasks import fields, wording
from qtale_lightning.tasks.registry import register
from qtale_lightning.tasks.task import HubSource, Task

register(
    Task(
        name="arc_challenge",
        title="ARC-c",
        metric="acc_norm",
        rows=1119,
        hub=HubSource("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453", "ARC-Challenge"),
        parse=fields.lettered("arc_challenge", "question"),
        cloze=wording.cloze,
        choice=wording.choice,
    )
)
