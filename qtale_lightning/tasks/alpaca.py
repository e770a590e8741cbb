"""Alpaca: instructions to follow in writing."""

from collections.abc import Sequence

from qtale_lightning.tasks import fields
from qtale_lightning.tasks.registry import register
from qtale_lightning.tasks.task import HubSource, Question, Row, Task

# Stanford Alpaca's words (tatsu-lab/stanford_alpaca, train.py), which end in "Response:". The line break after it is
# torchtune's: tokenizers split there, while a quote or bracket that opens an answer would melt with the colon.
_PROMPT = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_PAIRED = ", paired with an input that provides further context"


def _parse(row: Row) -> Question:
    """`input` is what the instruction is about, and may be empty."""
    given = row.get("input")
    if not isinstance(given, str):
        raise ValueError(f"field 'input': expected text, which may be empty, got {fields.shown(given)}")
    return Question(
        "alpaca", fields.text(row, "instruction"), (fields.text(row, "output"),), 0, given.strip()
    )


def _prompt(question: Question) -> Sequence[tuple[str, str]]:
    paired, given = (_PAIRED, f"### Input:\n{question.context}\n\n") if question.context else ("", "")
    prompt = _PROMPT.format(paired=paired, instruction=question.text, input=given)
    return [(prompt, question.choices[0])]


register(
    Task(
        name="alpaca",
        title="Alpaca",
        metric="perplexity",
        rows=49760,
        # It has a training split only: its last 2,000 of 51,760 rows are held out.
        hub=HubSource(
            "yahma/alpaca-cleaned",
            "12567cabf869d7c92e573c7c783905fc160e9639",
            train="train[:-2000]",
            validation="train[-2000:]",
            skip_empty="output",
        ),
        parse=_parse,
        cloze=_prompt,
        template="Stanford Alpaca's, with a line break after 'Response:'",
        new_tokens=128,
    )
)
