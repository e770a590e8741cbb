"""Tasks beyond commonsense questions through the data module: examples, own calibration rows, what is written."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.tasks import SUITES

SUBJECTS = ("anatomy", "world_religions")


def rows(task: str, count: int, first: int = 0) -> list[dict[str, Any]]:
    """Made rows, each of its own number; mmlu's of two subjects in turn."""
    numbers = range(first, first + count)
    if task == "mmlu":
        return [
            {
                "question": f"What is number {n}?",
                "subject": SUBJECTS[n % 2],
                "choices": [f"{n}a", f"{n}b", f"{n}c", f"{n}d"],
                "answer": n % 4,
            }
            for n in numbers
        ]
    if task == "alpaca":
        return [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in numbers]
    return [{"id": str(n), "dialogue": f"Ann: {n}?\nBob: Yes.", "summary": f"Bob has {n}."} for n in numbers]


def write(root: Path, task: str, split: str, made: list[dict[str, Any]]) -> None:
    (root / task).mkdir(exist_ok=True)
    (root / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, made)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """20 training and 10 validation rows of each task of the suite; mmlu's 6 dev rows are numbers 900 on."""
    for task in SUITES["generality"]:
        write(tmp_path, task, "train", rows(task, 20))
        write(tmp_path, task, "validation", rows(task, 10, first=100))
    write(tmp_path, "mmlu", "dev", rows("mmlu", 6, first=900))
    return tmp_path


def made(root: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> CommonsenseDataModule:
    data = CommonsenseDataModule(
        **{"tasks": "generality", "root": str(root), "batch_size": 4, "calibration_rows": 4} | options
    )
    data.tokenizer = tokenizer
    data.setup()
    return data


def test_examples_stand_before_scored_questions_of_their_subject(
    root: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = made(root, tokenizer, shots=3)
    for split in ("validation", "calibration"):
        questions = [question for question in data.questions(split) if question.task == "mmlu"]
        assert len(questions) == {"validation": 10, "calibration": 4}[split]
        for question in questions:
            text = tokenizer.decode(question.contexts[0])
            assert text.count("Answer:") == 4
            assert f"about {question.subject.replace('_', ' ')}." in text
            first = 900 + SUBJECTS.index(question.subject)
            places = [text.index(f"What is number {n}?") for n in (first, first + 2, first + 4)]
            assert places == sorted(places)  # all of them, in the file's order
    trained = [tokenizer.decode(ids) for ids in data.calibration_sequences(100)]
    assert not any("number 90" in text for text in trained)
    assert not any("number" in tokenizer.decode(q.contexts[0]) for q in data.questions("validation")[10:])


def test_too_few_examples_are_refused(root: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"--data\.shots 4: task 'mmlu' has 3 other dev rows of the subject"):
        made(root, tokenizer, shots=4)
    (root / "mmlu" / "dev.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"dev\.jsonl holds the examples"):
        made(root, tokenizer, shots=3)
    made(root, tokenizer)  # nobody needs them


def test_mmlus_own_calibration_rows_are_taken_where_there_are_any(
    root: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """As on the hub, whose training rows have no subject to take examples of."""
    write(root, "mmlu", "train", [row | {"subject": ""} for row in rows("mmlu", 20)])
    with pytest.raises(ValueError, match="0 other dev rows of the subject ''"):
        made(root, tokenizer, shots=3)
    write(root, "mmlu", "calibration", rows("mmlu", 6, first=500))
    write(root, "samsum", "calibration", rows("samsum", 6, first=500))  # no split of samsum's
    data = made(root, tokenizer, shots=3)
    texts = {task: [] for task in SUITES["generality"]}
    for question in data.questions("calibration"):
        texts[question.task].append(tokenizer.decode(question.contexts[0]).rpartition("What is")[2])
    assert all("number 50" in text for text in texts["mmlu"])
    assert not any("50" in text for text in texts["samsum"])
    assert len(data.calibration_sequences(100)) == 20 + 16 + 16


def test_metrics_and_what_is_written(root: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = made(root, tokenizer, generations=3)
    scored = {"mmlu": "acc", "alpaca": "perplexity"}
    assert data.asking.metrics() == {**scored, "samsum": "rougeL"}
    # Calibration questions select θ: log-likelihoods are enough.
    assert data.asking.metrics("calibration") == {**scored, "samsum": "perplexity"}
    assert data.asking.to_generate(data.questions("validation")) == {
        "alpaca": [10, 11, 12],
        "samsum": list(range(20, 30)),
    }
    assert [data.asking.new_tokens(task) for task in data.tasks] == [16, 128, 96]
    none = made(root, tokenizer, tasks="mmlu,alpaca", generations=0)
    assert none.asking.to_generate(none.questions("validation")) == {}


def test_choices_answered_in_writing(root: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = made(root, tokenizer, tasks="mmlu", answers="generated", max_new_tokens=5)
    assert data.asking.metrics() == {"mmlu": "acc_generated"}
    assert data.asking.metrics("calibration") == {"mmlu": "acc"}
    assert data.asking.to_generate(data.questions("validation")) == {"mmlu": list(range(10))}
    assert data.asking.new_tokens("mmlu") == 5
    assert data.protocol()["answers"] == "generated"


def test_protocol_of_the_suite(root: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    protocol = made(root, tokenizer, shots=3, choice_labels="numbers").protocol()
    assert (protocol["shots"], protocol["choice_labels"]) == (3, "numbers")
    assert set(protocol["templates"]) == set(SUITES["generality"])
    assert json.loads(json.dumps(protocol)) == protocol


def test_answers_that_lose_their_end_are_counted(
    root: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    long = [row | {"output": "on and on " * 60} for row in rows("alpaca", 2, first=40)]
    write(root, "alpaca", "train", [*rows("alpaca", 20), *long])
    with caplog.at_level(logging.WARNING):
        made(root, tokenizer, tasks="alpaca", max_length=150)
    assert "2 of 32 answers of alpaca lost their end to --data.max_length 150" in caplog.text
    caplog.clear()
    made(root, tokenizer, tasks="alpaca", max_length=1024)
    assert not caplog.text


def test_alpaca_on_real_rows(real_root: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    alpaca = real_root.parent / "alpaca"
    if not alpaca.is_dir():
        pytest.skip(f"no {alpaca}: it holds real rows of alpaca")
    data = CommonsenseDataModule(tasks="alpaca", root=str(real_root.parent), max_length=8192)
    data.tokenizer = tokenizer
    data.setup()
    assert len(data.questions("validation")) == 120
    for question in data.questions("validation"):
        assert tokenizer.decode(question.continuations[0]) == question.choices[0]
