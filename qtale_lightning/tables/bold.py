"""Whether one line of a table is better than another beyond chance, by what both answered to the same questions."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qtale_lightning.evaluation.predictions import compare_predictions, load_predictions
from qtale_lightning.evaluation.statistics import Estimate
from qtale_lightning.report.results import Evaluation

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


def is_better(
    ours: Sequence[Side], theirs: Sequence[Side], task: str | None, score: str, better: str
) -> bool:
    """Whether `ours` beats `theirs`, seed by seed; False where predictions or that score are missing.

    Questions may be the same for several seeds, so their intervals are averaged, not pooled: that can only be too
    careful.

    Args:
        task: Whose score; None: the average over tasks.
        score: `value` or `nll`.
        better: higher or lower.
    """
    estimates = [_difference(one, other, task, score) for one, other in zip(ours, theirs, strict=True)]
    found = [estimate for estimate in estimates if estimate is not None]
    if not found or len(found) < len(estimates):
        return False
    sign = 1 if better == "higher" else -1
    low = statistics.fmean(min(sign * e.low, sign * e.high) for e in found)
    return low > 0 and all(sign * e.value > 0 for e in found)


def _difference(ours: Side, theirs: Side, task: str | None, score: str) -> Estimate | None:
    outcomes = [load_predictions(side.root, side.row) for side in (ours, theirs)]
    chosen = [[one for one in found or [] if task in (None, one.task)] for found in outcomes]
    if not all(chosen) or not all(score in one.scores for found in chosen for one in found):
        return None
    return compare_predictions(chosen[0], chosen[1], score)
