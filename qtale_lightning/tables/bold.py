"""Whether one line of a table is better than another beyond chance, by what both answered to the same questions."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qtale_lightning.evaluation.statistics import Estimate
from qtale_lightning.results.predictions import compare_predictions, load_predictions
from qtale_lightning.results.schema import Evaluation

RULE = (
    "Bold: the best of its group, if the difference to the next best on the same questions is significant (paired "
    "bootstrap over questions within tasks: the 95 % interval leaves 0 out; over several seeds, the mean of their "
    "intervals does, and the sign is the same for all)."
)


@dataclass(frozen=True)
class Side:
    """A line's row for one seed, and where what was answered is kept."""

    root: Path
    row: Evaluation


@dataclass(frozen=True)
class Difference:
    """A line's score minus another's on the same questions, with the ends of its 95 % interval.

    Attributes:
        stderr: Over questions where there is one seed, else over seeds.
        significant: Not chance: the interval leaves 0 out, and the sign is the same for all seeds.
    """

    value: float
    stderr: float
    low: float
    high: float
    significant: bool


def difference(
    ours: Sequence[Side], theirs: Sequence[Side], task: str | None, score: str
) -> Difference | None:
    """`ours` minus `theirs`, seed by seed; None where predictions or that score are missing.

    Questions may be the same for several seeds, so their intervals are averaged, not pooled: that can only be too
    careful.

    Args:
        task: Whose score; None: the average over tasks.
        score: `value` or `nll`.
    """
    estimates = [_difference(one, other, task, score) for one, other in zip(ours, theirs, strict=True)]
    found = [estimate for estimate in estimates if estimate is not None]
    if not found or len(found) < len(estimates):
        return None
    values = [estimate.value for estimate in found]
    low, high = (statistics.fmean(ends) for ends in zip(*((e.low, e.high) for e in found), strict=True))
    stderr = found[0].stderr if len(found) == 1 else statistics.stdev(values) / math.sqrt(len(values))
    beyond = (low > 0 and min(values) > 0) or (high < 0 and max(values) < 0)
    return Difference(statistics.fmean(values), stderr, low, high, beyond)


def is_better(
    ours: Sequence[Side], theirs: Sequence[Side], task: str | None, score: str, better: str
) -> bool:
    """Whether `ours` beats `theirs` beyond chance, higher or lower being `better`."""
    found = difference(ours, theirs, task, score)
    return found is not None and found.significant and (found.value > 0) == (better == "higher")


def _difference(ours: Side, theirs: Side, task: str | None, score: str) -> Estimate | None:
    outcomes = [load_predictions(side.root, side.row) for side in (ours, theirs)]
    chosen = [[one for one in found or [] if task in (None, one.task)] for found in outcomes]
    if not all(chosen) or not all(score in one.scores for found in chosen for one in found):
        return None
    return compare_predictions(chosen[0], chosen[1], score)
