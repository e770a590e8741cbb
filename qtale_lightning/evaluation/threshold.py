"""Choosing θ: the rules that choose from what calibration questions say of a grid."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from qtale_lightning.evaluation.budget import TOLERANCE
from qtale_lightning.evaluation.statistics import RESAMPLES, Estimate

Row = TypeVar("Row", bound=Mapping[str, Any])

ONE_STANDARD_ERROR = (
    "the lowest execution ratio whose average accuracy on the calibration questions is within one standard error "
    "of the best of the grid (ties: the higher accuracy); by nll, where tasks report other things than accuracies"
)
NO_THETA = "nothing to select: the method has no θ"


def within_one_standard_error(rows: Sequence[Row]) -> Row:
    """The evaluation row that the one-standard-error rule selects (see :data:`ONE_STANDARD_ERROR`).

    Args:
        rows: Evaluation rows of one precision on calibration questions, one a θ.
    """
    if not rows:
        raise ValueError("nothing to select a threshold from: sweep the calibration split first")
    best = max(rows, key=_quality)
    error = best["average_nll_stderr"] if best["average"] is None else best["average_stderr"]
    good = [row for row in rows if _quality(row) >= _quality(best) - error]
    return min(good, key=lambda row: (row["execution_ratio"], -_quality(row)))


def _quality(row: Mapping[str, Any]) -> float:
    return -row["average_nll"] if row["average"] is None else row["average"]


def within_tolerance(rows: Sequence[Row], differences: Sequence[Estimate], margin: float | None) -> Row:
    """The evaluation row that the tolerance rule selects (see :func:`tolerance_in_words`).

    Args:
        rows: Evaluation rows of one precision on calibration questions, one a θ, with one at θ = 0.
        differences: Of each row's average accuracy to that at θ = 0, paired by question.
        margin: Accuracy that may be lost; None: any loss that isn't significant.
    """
    reference = [row for row in rows if row["theta"] == 0]
    if not reference:
        raise ValueError("nothing to compare thresholds with: score full execution (θ = 0) first")
    good = [
        row
        for row, difference in zip(rows, differences, strict=True)
        if (difference.high >= 0 if margin is None else difference.low > -margin)
    ]
    return min([*good, *reference], key=lambda row: (row["execution_ratio"], -row["average"]))


def tolerance_in_words(margin: float | None) -> str:
    """What the tolerance rule selects."""
    allowed = (
        "isn't significantly below 0 (the upper end of the interval reaches 0)"
        if margin is None
        else f"is shown to be above −{100 * margin:g} points (the lower end of the interval is)"
    )
    return (
        "the lowest execution ratio of the grid whose difference in average accuracy on the calibration questions to "
        f"full execution (θ = 0) of the same quantized model {allowed}; 95 % intervals of the paired difference by "
        f"bootstrap over questions within tasks, {RESAMPLES:,} resamples"
    )


def budget_in_words(budget: float, by_layer: bool) -> str:
    """What the two budget rules select."""
    target = f"an execution ratio of {budget:g} ± {TOLERANCE:g} on the calibration questions"
    if not by_layer:
        return f"one θ for all layers, searched for {target}"
    return (
        f"a θ for each layer, searched for {target} and the lowest nll there: from the θ for all, decisions moved to "
        "the layers where they lower the nll most a share of execution, as measured one layer at a time"
    )
