"""`facts`: a built-in generator of commonsense questions, which needs no files and no network.

Training asks every fact of the table in the training phrasings; validation asks *the same facts in other
words*, so that a small model which learned the facts, not the sentences, scores well. A question offers the
answer and three answers of the same relation that aren't true of its subject.
"""

from functools import cache
from random import Random
from string import ascii_uppercase
from typing import NamedTuple

from qtale_lightning.tasks import fields, wording
from qtale_lightning.tasks.fact_table import RELATIONS
from qtale_lightning.tasks.registry import register
from qtale_lightning.tasks.task import Question, Split, Task

DISTRACTORS = 3


class AskedFact(NamedTuple):
    """One fact in one phrasing."""

    text: str
    answer: str
    wrong_answers: tuple[str, ...]


@cache
def asked_facts(split: Split) -> tuple[AskedFact, ...]:
    """Every fact in every phrasing of a split, in the table's order.

    Raises:
        ValueError: The split is neither `train` nor `validation`.
    """
    if split not in ("train", "validation"):
        raise ValueError(f"unknown split {split!r}; known: train, validation")
    return tuple(
        AskedFact(_sentence(phrasing, subject), answer, relation.wrong_answers(subject, answer))
        for relation in RELATIONS.values()
        for subject, answer in relation.facts()
        for phrasing in (relation.train if split == "train" else relation.validation)
    )


def generate_facts(split: Split, seed: int, rows: int | None = None) -> list[Question]:
    """Questions of a split, in random order, with random wrong answers and the right one in a random place.

    Args:
        split: `train` or `validation`.
        seed: Seed of order, wrong answers and places.
        rows: Number of questions. None asks every fact once in every phrasing of the split (2,016 and
            504); more than that asks them again with other wrong answers.

    Raises:
        ValueError: The split is unknown, or `rows` isn't positive.
    """
    asked = asked_facts(split)
    rows = len(asked) if rows is None else rows
    if rows < 1:
        raise ValueError(f"rows must be positive, got {rows}")
    random = Random(f"facts-{split}-{seed}")
    questions: list[Question] = []
    while len(questions) < rows:
        drawn = random.sample(asked, min(len(asked), rows - len(questions)))
        questions += [_question(fact, random) for fact in drawn]
    return questions


def facts_corpus() -> list[str]:
    """Every question of both splits with its answer: the text to train a tokenizer for this task on."""
    facts = (*asked_facts("train"), *asked_facts("validation"))
    return [f"Question: {fact.text}\nAnswer: {fact.answer}" for fact in facts]


def _sentence(phrasing: str, subject: str) -> str:
    sentence = phrasing.format(s=subject)
    return sentence[0].upper() + sentence[1:]


def _question(fact: AskedFact, random: Random) -> Question:
    choices = [fact.answer, *random.sample(fact.wrong_answers, DISTRACTORS)]
    random.shuffle(choices)
    labels = list(ascii_uppercase[: len(choices)])
    answer_key = labels[choices.index(fact.answer)]
    row = {"question": fact.text, "choices": {"text": choices, "label": labels}, "answerKey": answer_key}
    return FACTS.parse(row)


FACTS = register(
    Task(
        name="facts",
        metric="acc",
        rows=2000,
        generate=generate_facts,
        parse=fields.lettered("facts", "question"),
        cloze=wording.cloze,
        choice=wording.choice,
    )
)
