"""What questions can tell: averages over tasks and paired differences, with their bootstrap errors and intervals."""

from collections.abc import Mapping, Sequence
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
    return _estimate(value, found.standard_error, interval.low, interval.high)


def average_over_seeds(seeds: Sequence[ByTask]) -> Estimate:
    """The mean over training seeds of :func:`average`, its error by the bootstrap over seeds *and* questions.

    Seeds and questions are crossed: each seed's model answers the same questions. So each resample draws seeds, and
    independently of them questions within each task, which are then the same for all the seeds drawn (the pigeonhole
    bootstrap: Owen, Annals of Applied Statistics 2007). Of S seeds it draws S - 1, which makes the variance between few
    seeds unbiased (Rao and Wu, JASA 1988); S of 3 would have two thirds of it. One seed is its own average.

    Raises:
        ValueError: There is no seed, task or question, or the seeds haven't the same numbers of questions.
    """
    if not seeds or any(
        {task: len(values) for task, values in seed.items()}
        != {task: len(values) for task, values in seeds[0].items()}
        for seed in seeds
    ):
        raise ValueError(f"not the same questions for each of {len(seeds)} seeds")
    if len(seeds) == 1:
        return average(seeds[0])
    by_task = [np.stack([np.asarray(seed[task], float) for seed in seeds]) for task in seeds[0]]
    rng, resampled, count = np.random.default_rng(SEED), list[np.ndarray](), len(seeds)
    for start in range(0, RESAMPLES, BATCH):
        size = min(BATCH, RESAMPLES - start)
        drawn = rng.multinomial(count - 1, [1 / count] * count, size) / (count - 1)
        means = [
            rng.multinomial(n, [1 / n] * n, size) @ task.T / n for task in by_task for n in task.shape[1:]
        ]
        resampled.append((drawn * np.mean(means, axis=0)).sum(axis=1))
    value, values = np.mean([task.mean() for task in by_task]), np.concatenate(resampled)
    tail = (1 - CONFIDENCE) / 2
    return _estimate(value, values.std(ddof=1), *np.quantile(values, [tail, 1 - tail]))


def _estimate(*numbers: float) -> Estimate:
    """Rounded, so that sums which are 0 but for the order of their terms are 0."""
    return Estimate(*(round(float(number), 12) for number in numbers))


def paired_difference_over_seeds(ours: Sequence[ByTask], theirs: Sequence[ByTask]) -> Estimate:
    """:func:`average_over_seeds` of the differences ``ours − theirs`` of two methods' models, seed by seed and question
    by question.

    What makes a question hard for both cancels out, so far smaller differences show than between two averages.

    Raises:
        ValueError: See there, or a pair wasn't asked the same number of questions of the same tasks.
    """
    return average_over_seeds([_differences(*pair) for pair in zip(ours, theirs, strict=True)])


def _differences(ours: ByTask, theirs: ByTask) -> ByTask:
    sizes = [{task: len(values) for task, values in scores.items()} for scores in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"not the same questions, so there are no pairs: {sizes[0]} and {sizes[1]}")
    return {task: np.asarray(ours[task], float) - np.asarray(theirs[task], float) for task in ours}
