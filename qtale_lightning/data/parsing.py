"""How a row of each task's dataset becomes a `Question`, which knows of no prompt.

A row keeps the field names of its Hugging Face dataset, whether it comes from the hub or from a local JSON Lines
file, so that one function serves both. Each raises `ValueError` that names the malformed field.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from reprlib import Repr
from string import ascii_uppercase
from typing import Any

Row = Mapping[str, Any]

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass(frozen=True)
class Question:
    """One multiple-choice question, or a task to write a text for, whose one choice is the reference.

    Attributes:
        task: Name of its task.
        text: The question, the sentence with one blank `_` (winogrande), the instruction or the dialogue.
        choices: Text of each choice, as the dataset has it.
        label: Index of the right choice.
        context: What it refers to (boolq's passage, social_iqa's situation, alpaca's input); empty where there is
            none.
        subject: The part of the task that it belongs to (mmlu's 57 subjects); empty where there are none.
    """

    task: str
    text: str
    choices: tuple[str, ...]
    label: int
    context: str = ""
    subject: str = ""


def _shown(value: Any) -> str:
    """A value as a message shows it: however long or deep it is, a line's worth."""
    return _SHORT.repr(value)


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field '{field}': expected text, got {_shown(value)}")
    return value


def _index(row: Row, field: str, values: Sequence[str]) -> int:
    """Position of a field's value among the values that it may have."""
    value = str(row.get(field)).strip()
    if value not in values:
        raise ValueError(
            f"field '{field}': expected one of {', '.join(values)}, got {_shown(row.get(field))}"
        )
    return values.index(value)


def parse_piqa(row: Row) -> Question:
    choices = (_text(row, "sol1"), _text(row, "sol2"))
    return Question("piqa", _text(row, "goal"), choices, _index(row, "label", ("0", "1")))


def parse_boolq(row: Row) -> Question:
    """`answer` is a bool in google/boolq; SuperGLUE's copy has `label`, 0 or 1. The passage is optional."""
    if "answer" in row:
        if not isinstance(row["answer"], bool):
            raise ValueError(f"field 'answer': expected true or false, got {_shown(row['answer'])}")
        label = int(row["answer"])
    elif "label" in row:
        label = _index(row, "label", ("0", "1"))
    else:
        raise ValueError("field 'answer': missing (and so is 'label')")
    passage = _text(row, "passage") if row.get("passage") is not None else ""
    return Question("boolq", _text(row, "question"), ("no", "yes"), label, passage)


def parse_social_iqa(row: Row) -> Question:
    choices = tuple(_text(row, field) for field in ("answerA", "answerB", "answerC"))
    label = _index(row, "label", ("1", "2", "3"))
    return Question("social_iqa", _text(row, "question"), choices, label, _text(row, "context"))


def parse_winogrande(row: Row) -> Question:
    sentence = _text(row, "sentence")
    if sentence.count("_") != 1 or not sentence.partition("_")[2].strip():
        raise ValueError(
            f"field 'sentence': expected one blank '_' and text after it, got {_shown(sentence)}"
        )
    choices = (_text(row, "option1"), _text(row, "option2"))
    return Question("winogrande", sentence, choices, _index(row, "answer", ("1", "2")))


def parse_lettered(task: str, text_field: str) -> Callable[[Row], Question]:
    """ARC and OpenBookQA: `choices` holds parallel lists of texts and labels ("A".."E" or "1".."5")."""

    def parse(row: Row) -> Question:
        choices = row.get("choices")
        if not isinstance(choices, Mapping):
            raise ValueError(f"field 'choices': expected lists 'text' and 'label', got {_shown(choices)}")
        texts, labels = choices.get("text"), choices.get("label")
        if not isinstance(texts, list) or len(texts) < 2:
            raise ValueError(
                f"field 'choices.text': expected a list of two texts or more, got {_shown(texts)}"
            )
        if any(not isinstance(text, str) or not text.strip() for text in texts):
            raise ValueError(f"field 'choices.text': expected texts, got {_shown(texts)}")
        if not isinstance(labels, list) or [type(label) for label in labels] != [str] * len(texts):
            raise ValueError(f"field 'choices.label': expected {len(texts)} labels, got {_shown(labels)}")
        return Question(task, _text(row, text_field), tuple(texts), _index(row, "answerKey", labels))

    return parse


def parse_mmlu(row: Row) -> Question:
    """`answer` is an index or a letter. `subject` is empty in the hub's auxiliary training rows."""
    choices = row.get("choices")
    if not isinstance(choices, list) or [type(choice) for choice in choices] != [str] * 4:
        raise ValueError(f"field 'choices': expected four texts, got {_shown(choices)}")
    subject = row.get("subject")
    if not isinstance(subject, str):
        raise ValueError(f"field 'subject': expected text, got {_shown(subject)}")
    answer = str(row.get("answer")).strip()
    values = ascii_uppercase[:4] if answer.isalpha() else "0123"
    return Question(
        "mmlu",
        _text(row, "question").strip(),
        tuple(choices),
        _index(row, "answer", tuple(values)),
        subject=subject.strip(),
    )


def parse_alpaca(row: Row) -> Question:
    """`input` is what the instruction is about, and may be empty."""
    if not isinstance(row.get("input"), str):
        raise ValueError(f"field 'input': expected text, which may be empty, got {_shown(row.get('input'))}")
    return Question("alpaca", _text(row, "instruction"), (_text(row, "output"),), 0, row["input"].strip())


def parse_samsum(row: Row) -> Question:
    """Some copies of the dataset end lines with carriage returns."""
    dialogue = "\n".join(_text(row, "dialogue").splitlines())
    return Question("samsum", dialogue, (_text(row, "summary").strip(),), 0)
