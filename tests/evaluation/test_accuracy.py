"""Accuracy and its standard error, by hand."""

import math

import numpy as np
import pytest

from qtale_lightning.data import EncodedPrompt
from qtale_lightning.evaluation.accuracy import standard_error, task_accuracy


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
