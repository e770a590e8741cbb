"""SAMSum: dialogues to summarize."""

from qtale_lightning.tasks import fields, wording
from qtale_lightning.tasks.registry import register
from qtale_lightning.tasks.task import HubSource, Question, Row, Task


def _parse(row: Row) -> Question:
    """Some copies of the dataset end lines with carriage returns."""
    dialogue = "\n".join(fields.text(row, "dialogue").splitlines())
    return Question("samsum", dialogue, (fields.text(row, "summary").strip(),), 0)


register(
    Task(
        name="samsum",
        title="SAMSum",
        metric="rougeL",
        rows=14731,
        hub=HubSource(
            "knkarthick/samsum",
            "f8040674894a743112febaddde2b32264c07bb20",
            validation="test",
            skip_empty="dialogue",
        ),
        parse=_parse,
        # meta-llama/llama-recipes
        cloze=wording.each_choice(lambda asked: f"Summarize this dialog:\n{asked.text}\n---\nSummary:\n"),
        template="'Summarize this dialog:', as in Meta's llama-recipes",
        new_tokens=96,
    )
)
