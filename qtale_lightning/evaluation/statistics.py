"""What questions can tell: averages over tasks and paired differences, with their bootstrap errors and intervals."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9_999
SEED = 0
# Resamples drawn at a time: bounds memory, and, as it orders the random draws, is part of what makes them repeat.
BATCH = 500

ByTask = Mapping[str, np.ndarray]
"""One value a question, ``(questions,)``, by task."""


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks, of equal weight, with its standard error and the ends of its 95 % confidence interval."""

    value: float
    stderr: float
    low: float
    high: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves 0 out: at 95 %, not chance."""
        return self.low > 0 or self.high < 0


def average(values: ByTask) -> Estimate:
    """The mean over tasks of their means, its error by the bootstrap over questions within each task (seeded).

    Tasks keep their number of questions in every resample (stratified); the interval is the percentile interval.

    Raises:
        ValueError: There is no task, or a task without a question.
    """
    if not values or not all(len(task) for task in values.values()):
        raise ValueError(f"no questions to average over: { ({task: len(v) for task, v in values.items()}) }")
    # A single question says nothing of its task's spread; twice itself, it adds none.
    strata = [np.repeat(task, 2) if len(task) == 1 else np.asarray(task) for task in values.values()]
    found = stats.bootstrap(
        [stratum.astype(float) for stratum in strata],
        lambda *tasks, axis: np.mean([task.mean(axis) for task in tasks], axis=0),
        n_resamples=RESAMPLES,
        batch=BATCH,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=SEED,
    )
    value = np.mean([stratum.mean() for stratum in strata])
    interval = found.confidence_interval
    # Rounded, so that sums which are 0 but for the order of their terms are 0.
    return Estimate(
        *(round(float(x), 12) for x in (value, found.standard_error, interval.low, interval.high))
    )


def paired_difference(ours: ByTask, theirs: ByTask) -> Estimate:
    """:func:`average` of the differences ``ours − theirs`` of two models on the same questions, question by question.

    What makes a question hard for both cancels out, so far smaller differences show than between two averages.

    Raises:
        ValueError: The two weren't asked the same number of questions of the same tasks.
    """
    sizes = [{task: len(values) for task, values in scores.items()} for scores in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"not the same questions, so there are no pairs: {sizes[0]} and {sizes[1]}")
    return average({task: np.asarray(ours[task], float) - np.asarray(theirs[task], float) for task in ours})
