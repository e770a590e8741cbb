"""Whether one line of a table is better than another beyond chance, by what both answered to the same questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qtale_lightning.evaluation.statistics import Estimate
from qtale_lightning.results.predictions import Prediction, compare_seeds, load_predictions
from qtale_lightning.results.schema import Evaluation

RULE = (
    "Bold: the best of its group, if the difference to the next best on the same questions is significant (paired "
    "bootstrap over questions within tasks, and over seeds where there are several: the 95 % interval leaves 0 out)."
)


@dataclass(frozen=True)
class Side:
    """A line's row for one seed, and where what was answered is kept."""

    root: Path
    row: Evaluation


def difference(ours: Sequence[Side], theirs: Sequence[Side], task: str | None, score: str) -> Estimate | None:
    """`ours` minus `theirs` over seeds and questions; None where predictions or that score are missing.

    Args:
        task: Whose score; None: the average over tasks.
        score: `value` or `nll`.
    """
    found = [_answers(side, task, score) for side in (*ours, *theirs)]
    return compare_seeds(found[: len(ours)], found[len(ours) :], score) if found and all(found) else None


def is_better(
    ours: Sequence[Side], theirs: Sequence[Side], task: str | None, score: str, better: str
) -> bool:
    """Whether `ours` beats `theirs` beyond chance, higher or lower being `better`."""
    found = difference(ours, theirs, task, score)
    return found is not None and found.significant and (found.value > 0) == (better == "higher")


def _answers(side: Side, task: str | None, score: str) -> list[Prediction]:
    """What a side answered; nothing where predictions or that score are missing."""
    found = [one for one in load_predictions(side.root, side.row) or [] if task in (None, one.task)]
    return found if all(score in one.scores for one in found) else []
