"""Choosing θ: from what calibration questions say of every θ of a grid."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Row = TypeVar("Row", bound=Mapping[str, Any])

RULE = "one-standard-error"
RULE_IN_WORDS = (
    "the lowest execution ratio whose average accuracy on the calibration questions is within one standard error "
    "of the best of the grid (ties: the higher accuracy)"
)


def check_thresholds(thresholds: Sequence[float]) -> None:
    """Refuse a grid that isn't one (ValueError)."""
    if not thresholds:
        raise ValueError("the threshold grid is empty: give at least one value (--sweep.thresholds)")
    for value in thresholds:
        if not 0 <= value <= 1:
            raise ValueError(
                f"threshold {value} is not a probability: give values in [0, 1] (--sweep.thresholds)"
            )


def select(rows: Sequence[Row]) -> Row:
    """The evaluation row that the one-standard-error rule selects (see :data:`RULE_IN_WORDS`).

    Args:
        rows: Evaluation rows of one precision on calibration questions, one a θ.
    """
    if not rows:
        raise ValueError("nothing to select a threshold from: sweep the calibration split first")
    best = max(rows, key=lambda row: row["average"])
    good = [row for row in rows if row["average"] >= best["average"] - best["average_stderr"]]
    return min(good, key=lambda row: (row["execution_ratio"], -row["average"]))
