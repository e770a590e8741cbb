"""Rows from anywhere: a question or a ValueError that says what is wrong, never another error."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtale_lightning.data.readers import read_local
from qtale_lightning.tasks import TASKS, Question

texts = st.text(max_size=12) | st.sampled_from(["A", "B", "1", "0", "2", "a_b", " _ x", " "])
scalars = st.none() | st.booleans() | st.integers(-2, 5) | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["text", "label"]), inner),
    max_leaves=8,
)
FIELDS = (
    "sol1", "sol2", "goal", "label", "answer", "question", "passage", "context", "answerA", "answerB", "answerC",
    "sentence", "option1", "option2", "choices", "answerKey", "question_stem", "subject", "instruction", "input",
    "output", "dialogue", "summary",
)  # fmt: skip
rows = st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, texts | values))
lettered = st.builds(
    lambda n, key, text, question: {
        "choices": {"text": text[:n], "label": list("ABCDE")[:n]}, "answerKey": key, "question": question,
        "question_stem": question,
    },
    st.integers(0, 5), st.sampled_from("ABCDEF"), st.lists(texts, min_size=5, max_size=5), texts,
)  # fmt: skip
tasks = st.sampled_from(sorted(TASKS))


@pytest.mark.slow
@settings(max_examples=200)
@given(tasks, rows | lettered)
def test_a_row_is_a_question_or_a_value_error(task: str, row: dict[str, Any]) -> None:
    question = parsed(task, row)
    if isinstance(question, str):
        assert "field '" in question
        return
    assert question.task == task
    assert 0 <= question.label < len(question.choices)
    assert all(isinstance(text, str) for text in (question.text, question.context, *question.choices))
    assert question.text.strip()


def parsed(task: str, row: dict[str, Any]) -> Question | str:
    """The question, or what is wrong with the row."""
    try:
        return TASKS[task].parse(row)
    except ValueError as error:
        return str(error)


json_lines = st.one_of(
    rows.map(json.dumps),
    st.text(max_size=20),
    values.map(json.dumps),
    st.just('{"a": NaN}'),
    st.just("[" * 50),
)


@settings(max_examples=60)
@given(
    tasks.filter(lambda task: TASKS[task].hub is not None),
    st.lists(json_lines, max_size=3),
    st.binary(max_size=8),
)
def test_a_file_is_read_or_refused_by_its_line(
    tmp_path: Path, task: str, lines: list[str], tail: bytes
) -> None:
    file = tmp_path / task / "train.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + b"\n" + tail)
    found = read(task, tmp_path)
    if isinstance(found, str):
        assert str(file) in found or f"no rows for task {task!r}" in found
    else:
        assert found


def read(task: str, root: Path) -> list[Question] | str:
    """The questions, or why there are none."""
    try:
        return read_local(task, root, "train")
    except ValueError as error:
        return str(error)
