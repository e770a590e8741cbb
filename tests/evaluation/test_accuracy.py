"""Accuracy and its standard error, by hand."""

import math

import numpy as np
import pytest

from qtale_lightning.data import EncodedPrompt
from qtale_lightning.evaluation.accuracy import accuracy_by_task, average, task_accuracy
from qtale_lightning.evaluation.text import standard_error


def question(label: int, lengths: tuple[int, ...], answer_tokens: tuple[int, ...]) -> EncodedPrompt:
    """With choices of these many characters and tokens."""
    return EncodedPrompt(
        "facts", label, ((1, 2),) * len(lengths), tuple((3,) * n for n in answer_tokens), lengths
    )


def test_accuracy_by_hand() -> None:
    asked = [
        question(0, (2, 10), (1, 4)),  # -2 > -6: acc right; per character -1 < -0.6: acc_norm wrong
        question(1, (2, 10), (2, 5)),  # acc wrong, acc_norm right
        question(1, (4, 4), (1, 2)),  # both right
        question(0, (4, 4), (3, 2)),  # both wrong
    ]
    scores = [np.array(s) for s in ([-2.0, -6.0], [-2.0, -6.0], [-9.0, -1.0], [-9.0, -1.0])]
    # Two hits of four: deviations of ±1/2, so a variance (n - 1) of 1/3.
    error = math.sqrt(1 / 3 / 4)
    nll = [2 / 1, 6 / 5, 1 / 2, 9 / 3]
    mean = sum(nll) / 4
    row = task_accuracy(asked, scores, "acc_norm")
    assert row == {
        "value": 0.5,
        "stderr": pytest.approx(error),
        "metric": "acc_norm",
        "nll": pytest.approx(mean),
        "nll_stderr": pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in nll) / 3 / 4)),
        "acc": 0.5,
        "acc_norm": 0.5,
        "examples": 4,
    }


def test_the_two_metrics_differ_and_the_named_one_is_reported() -> None:
    asked = [question(0, (2, 10), (1, 4))]
    scores = [np.array([-2.0, -6.0])]
    by_metric = {metric: task_accuracy(asked, scores, metric) for metric in ("acc", "acc_norm")}
    assert by_metric["acc"]["value"] == 1.0
    assert by_metric["acc_norm"]["value"] == 0.0
    assert all((row["acc"], row["acc_norm"]) == (1.0, 0.0) for row in by_metric.values())


def test_a_single_question_has_no_standard_error() -> None:
    assert standard_error(np.array([0.7])) == 0.0


def asked(subject: str, label: int = 0) -> EncodedPrompt:
    """A question of mmlu with choices labelled A to D."""
    return EncodedPrompt(
        "mmlu",
        label,
        ((1, 2),) * 4,
        ((3,),) * 4,
        (1,) * 4,
        ("iron", "wood", "wool", "clay"),
        tuple("ABCD"),
        subject,
    )


RIGHT, WRONG = np.array([-1.0, -2.0, -3.0, -4.0]), np.array([-2.0, -1.0, -3.0, -4.0])


def test_subjects_weigh_by_their_size() -> None:
    """The value is over all questions; its error is lm-evaluation-harness's, pooled over subjects."""
    questions = [asked("anatomy")] * 4 + [asked("virology")] * 2
    row = task_accuracy(questions, [RIGHT, RIGHT, RIGHT, WRONG, WRONG, WRONG], "acc")
    assert row["value"] == 3 / 6  # the mean of 3/4 and 0 would be 3/8
    # Sums of squared deviations: 3/4 in anatomy, 0 in virology, of 6 - 2 degrees of freedom.
    assert row["stderr"] == pytest.approx(math.sqrt(0.75 / 4 / 6))
    assert row["subjects"] == {
        "anatomy": {"value": 0.75, "stderr": pytest.approx(math.sqrt(0.75 / 3 / 4)), "examples": 4},
        "virology": {"value": 0.0, "stderr": 0.0, "examples": 2},
    }


def test_a_question_a_subject_has_nothing_to_pool() -> None:
    row = task_accuracy([asked("anatomy"), asked("virology")], [RIGHT, WRONG], "acc")
    assert row["stderr"] == pytest.approx(math.sqrt(0.5 / 2))


def test_written_answers_that_cant_be_read_are_wrong_and_counted() -> None:
    questions = [asked("anatomy"), asked("anatomy", 1), asked("anatomy"), asked("anatomy")]
    scores = [RIGHT, RIGHT, RIGHT, WRONG]
    row = task_accuracy(questions, scores, "acc_generated", ["A", "A. iron", "I don't know", "iron"])
    assert row["value"] == 2 / 4  # the first and the last
    assert row["unreadable"] == 1 / 4
    assert row["acc"] == 2 / 4  # by log-likelihood: the first and the third
    assert row["metric"] == "acc_generated"


def test_each_task_is_measured_by_its_metric() -> None:
    text = EncodedPrompt("samsum", 0, ((1,),), ((2, 3),), (4,), ("noon",))
    questions = [asked("anatomy"), text, asked("anatomy", 1)]
    scores = [RIGHT, np.array([-4.0]), RIGHT]
    found = accuracy_by_task(questions, scores, {"mmlu": "acc", "samsum": "perplexity"})
    assert (found["mmlu"]["value"], found["samsum"]["value"]) == (0.5, pytest.approx(math.exp(2)))
    assert "unreadable" not in found["mmlu"]
    written = {0: "A", 1: "at noon", 2: "B"}
    found = accuracy_by_task(questions, scores, {"mmlu": "acc_generated", "samsum": "rougeL"}, written)
    assert (found["mmlu"]["value"], found["mmlu"]["acc"]) == (1.0, 0.5)
    assert found["samsum"]["value"] == pytest.approx(2 / 3)


def test_only_accuracies_have_an_average() -> None:
    choices = {"value": 0.5, "stderr": 0.3, "nll": 1.0, "nll_stderr": 0.03}
    tasks: dict[str, dict[str, object]] = {
        "piqa": {"metric": "acc_norm", **choices},
        "mmlu": {"metric": "acc_generated", **choices, "value": 0.7, "stderr": 0.4},
    }
    assert average(tasks) == {
        "average": pytest.approx(0.6),
        "average_stderr": pytest.approx(0.25),
        "average_nll": 1.0,
        "average_nll_stderr": pytest.approx(0.03 / math.sqrt(2)),
    }
    tasks["alpaca"] = {"metric": "perplexity", **choices, "nll": 4.0, "value": 54.6}
    found = average(tasks)
    assert (found["average"], found["average_stderr"]) == (None, None)
    assert found["average_nll"] == 2.0
    assert (
        found["no_average"] == "alpaca reports perplexity: not an accuracy, so there is no average accuracy"
    )
