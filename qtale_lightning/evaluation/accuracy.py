"""From log-likelihoods and written answers to each task's row of results, and the average over tasks.

``acc`` and ``acc_norm`` are lm-evaluation-harness's.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qtale_lightning.data.tokenization import EncodedPrompt
from qtale_lightning.evaluation.generation import read_answer
from qtale_lightning.evaluation.text import standard_error, text_measures

ACCURACIES = ("acc", "acc_norm", "acc_generated")


def task_accuracy(
    questions: Sequence[EncodedPrompt],
    scores: Sequence[np.ndarray],
    metric: str,
    texts: Sequence[str] | None = None,
) -> dict[str, object]:
    """One task's row of results: value and standard error of its metric, and the gold answers' nll in nats a token.

    ``acc`` takes the choice of highest log-likelihood, ``acc_norm`` that of the highest per character
    (lm-evaluation-harness), ``acc_generated`` the one that is read from what the model wrote (`read_answer`); the
    standard error is binomial. A task with subjects has a row for each, its value is the mean over all questions,
    so that a subject weighs by its size, and its error is pooled over subjects: as the harness reports them.

    Args:
        questions: The task's.
        scores: Log-likelihoods of each question's choices.
        metric: One of :data:`ACCURACIES`.
        texts: What the model wrote, one a question; needed for ``acc_generated``, and kept as ``unreadable`` share.
    """
    labels = np.array([question.label for question in questions])
    per_length = [s / q.choice_lengths for q, s in zip(questions, scores, strict=True)]
    hits = {
        "acc": np.array([int(s.argmax()) for s in scores]) == labels,
        "acc_norm": np.array([int(s.argmax()) for s in per_length]) == labels,
    }
    row: dict[str, object] = {}
    if texts is not None:
        read = [read_answer(t, q.labels, q.choices) for q, t in zip(questions, texts, strict=True)]
        hits["acc_generated"] = np.array(
            [answer == label for answer, label in zip(read, labels, strict=True)]
        )
        row["unreadable"] = sum(answer is None for answer in read) / len(read)
    nll = np.array(
        [-s[q.label] / len(q.continuations[q.label]) for q, s in zip(questions, scores, strict=True)]
    )
    reported = hits[metric].astype(float)
    row |= {
        "value": float(reported.mean()),
        "stderr": standard_error(reported),
        "metric": metric,
        "nll": float(nll.mean()),
        "nll_stderr": standard_error(nll),
        "acc": float(hits["acc"].mean()),
        "acc_norm": float(hits["acc_norm"].mean()),
        "examples": len(questions),
    }
    if any(question.subject for question in questions):
        by_subject = _by_subject(questions, reported)
        row |= {"stderr": _pooled_error(by_subject, row["stderr"]), "subjects": by_subject}
    return row


def _by_subject(questions: Sequence[EncodedPrompt], hits: np.ndarray) -> dict[str, dict[str, float]]:
    subjects = np.array([question.subject for question in questions])
    found = {subject: hits[subjects == subject] for subject in sorted(set(subjects.tolist()))}
    return {
        subject: {"value": float(own.mean()), "stderr": standard_error(own), "examples": len(own)}
        for subject, own in found.items()
    }


def _pooled_error(subjects: Mapping[str, Mapping[str, float]], unpooled: Any) -> float:
    """Standard error of the mean of all questions, from the variance within subjects (n·se² each, pooled)."""
    count = sum(subject["examples"] for subject in subjects.values())
    freedom = count - len(subjects)
    if freedom < 1:  # a question a subject
        return float(unpooled)
    squares = sum((s["examples"] - 1) * s["examples"] * s["stderr"] ** 2 for s in subjects.values())
    return math.sqrt(squares / freedom / count)


def accuracy_by_task(
    questions: Sequence[EncodedPrompt],
    scores: Sequence[np.ndarray],
    metrics: Mapping[str, str],
    texts: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """Each task's row of results, by the metric that it reports: `task_accuracy`, or `text_measures`.

    Args:
        questions: Of any tasks.
        scores: Log-likelihoods of each question's choices.
        metrics: Of each task.
        texts: What the model wrote, by the question's index.
    """
    accuracy = {}
    for task in dict.fromkeys(question.task for question in questions):
        chosen = [i for i, question in enumerate(questions) if question.task == task]
        written = [texts[i] for i in chosen] if texts and all(i in texts for i in chosen) else None
        measure = task_accuracy if metrics[task] in ACCURACIES else text_measures
        accuracy[task] = measure(
            [questions[i] for i in chosen], [scores[i] for i in chosen], metrics[task], written
        )
    return accuracy


def average(accuracy: Mapping[str, Any]) -> dict[str, float | str | None]:
    """``average`` and its error over tasks that report accuracies; None, and why, where a task reports something else.

    Accuracy, perplexity and ROUGE are no measures of one thing. The nll is, so it has an average in any case.
    """
    others = {task: row["metric"] for task, row in accuracy.items() if row["metric"] not in ACCURACIES}
    found: dict[str, float | str | None] = {
        "average": None if others else mean_over_tasks(accuracy, "value"),
        "average_stderr": None if others else mean_error(accuracy, "stderr"),
        "average_nll": mean_over_tasks(accuracy, "nll"),
        "average_nll_stderr": mean_error(accuracy, "nll_stderr"),
    }
    if others:
        what = ", ".join(f"{task} reports {metric}" for task, metric in others.items())
        found["no_average"] = f"{what}: not an accuracy, so there is no average accuracy"
    return found


def mean_over_tasks(accuracy: Mapping[str, Any], key: str) -> float:
    """Mean of a number of every task, with equal weight."""
    return sum(task[key] for task in accuracy.values()) / len(accuracy)


def mean_error(accuracy: Mapping[str, Any], key: str) -> float:
    """Standard error of a mean over tasks with independent questions, from the tasks' own."""
    return float(sum(task[key] ** 2 for task in accuracy.values()) ** 0.5 / len(accuracy))
