"""Fields of a row, checked: each function raises `ValueError` that names the malformed field.

A row keeps the field names of its Hugging Face dataset, whether it comes from the hub or from a local JSON Lines
file, so that one function serves both.
"""

from collections.abc import Callable, Mapping, Sequence
from reprlib import Repr
from typing import Any

from qtale_lightning.tasks.task import Question, Row

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: Any) -> str:
    """A value as a message shows it: however long or deep it is, a line's worth."""
    return _SHORT.repr(value)


def text(row: Row, field: str) -> str:
    """A field's text, which mustn't be empty."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field '{field}': expected text, got {shown(value)}")
    return value


def index(row: Row, field: str, values: Sequence[str]) -> int:
    """Position of a field's value among the values that it may have."""
    value = str(row.get(field)).strip()
    if value not in values:
        raise ValueError(f"field '{field}': expected one of {', '.join(values)}, got {shown(row.get(field))}")
    return values.index(value)


def lettered(task: str, text_field: str) -> Callable[[Row], Question]:
    """A parser of rows as AI2's datasets have them: `choices` holds parallel lists of texts and labels ("A".."E" or
    "1".."5")."""

    def parse(row: Row) -> Question:
        choices = row.get("choices")
        if not isinstance(choices, Mapping):
            raise ValueError(f"field 'choices': expected lists 'text' and 'label', got {shown(choices)}")
        texts, labels = choices.get("text"), choices.get("label")
        if not isinstance(texts, list) or len(texts) < 2:
            raise ValueError(
                f"field 'choices.text': expected a list of two texts or more, got {shown(texts)}"
            )
        if any(not isinstance(one, str) or not one.strip() for one in texts):
            raise ValueError(f"field 'choices.text': expected texts, got {shown(texts)}")
        if not isinstance(labels, list) or [type(label) for label in labels] != [str] * len(texts):
            raise ValueError(f"field 'choices.label': expected {len(texts)} labels, got {shown(labels)}")
        return Question(task, text(row, text_field), tuple(texts), index(row, "answerKey", labels))

    return parse
