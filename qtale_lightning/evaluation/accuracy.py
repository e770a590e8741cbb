"""From log-likelihoods to accuracy, as lm-evaluation-harness defines ``acc`` and ``acc_norm``."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qtale_lightning.data.tokenization import EncodedPrompt


def task_accuracy(
    questions: Sequence[EncodedPrompt], scores: Sequence[np.ndarray], metric: str
) -> dict[str, object]:
    """One task's row of results: value and standard error of its metric, and the gold answers' nll in nats a token.

    ``acc`` takes the choice of highest log-likelihood, ``acc_norm`` that of the highest per character
    (lm-evaluation-harness); the standard error is binomial.
    """
    labels = np.array([question.label for question in questions])
    hits = {
        "acc": np.array([int(s.argmax()) for s in scores]) == labels,
        "acc_norm": np.array(
            [int((s / q.choice_lengths).argmax()) for q, s in zip(questions, scores, strict=True)]
        )
        == labels,
    }
    nll = np.array(
        [-s[q.label] / len(q.continuations[q.label]) for q, s in zip(questions, scores, strict=True)]
    )
    return {
        "value": float(hits[metric].mean()),
        "stderr": standard_error(hits[metric].astype(float)),
        "metric": metric,
        "nll": float(nll.mean()),
        "nll_stderr": standard_error(nll),
        "acc": float(hits["acc"].mean()),
        "acc_norm": float(hits["acc_norm"].mean()),
        "examples": len(questions),
    }


def accuracy_by_task(
    questions: Sequence[EncodedPrompt], scores: Sequence[np.ndarray], metrics: Mapping[str, str]
) -> dict[str, Any]:
    """`task_accuracy` of each task among the questions, by the metric that the task reports."""
    accuracy = {}
    for task in dict.fromkeys(question.task for question in questions):
        chosen = [i for i, question in enumerate(questions) if question.task == task]
        accuracy[task] = task_accuracy(
            [questions[i] for i in chosen], [scores[i] for i in chosen], metrics[task]
        )
    return accuracy


def mean_over_tasks(accuracy: Mapping[str, Any], key: str) -> float:
    """Mean of a number of every task, with equal weight."""
    return sum(task[key] for task in accuracy.values()) / len(accuracy)


def mean_error(accuracy: Mapping[str, Any], key: str) -> float:
    """Standard error of a mean over tasks with independent questions, from the tasks' own."""
    return float(sum(task[key] ** 2 for task in accuracy.values()) ** 0.5 / len(accuracy))


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of independent values; 0 for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
