"""The one-standard-error rule and the grid's checks."""

from typing import Any

import pytest

from qtale_lightning.evaluation.threshold import check_thresholds, select


def row(theta: float, average: float, ratio: float, stderr: float = 0.02) -> dict[str, Any]:
    return {"theta": theta, "average": average, "average_stderr": stderr, "execution_ratio": ratio}


def test_the_cheapest_row_within_one_standard_error_of_the_best() -> None:
    rows = [row(0.5, 0.65, 0.5), row(0.3, 0.69, 0.6), row(0.1, 0.695, 0.8), row(0.01, 0.70, 1.0)]
    assert select(rows)["theta"] == 0.3


def test_the_best_rows_own_error_is_the_yardstick() -> None:
    rows = [row(0.5, 0.65, 0.5, stderr=0.5), row(0.1, 0.70, 0.9, stderr=0.02)]
    assert select(rows)["theta"] == 0.1


def test_just_inside_and_just_outside_one_standard_error() -> None:
    """With powers of two, so that the bound is exact."""
    best = row(0.1, 0.75, 0.9, stderr=0.25)
    assert select([row(0.5, 0.5, 0.5), best])["theta"] == 0.5
    assert select([row(0.5, 0.499, 0.5), best])["theta"] == 0.1


def test_without_error_only_the_best_is_good() -> None:
    rows = [row(0.5, 0.69, 0.5, stderr=0.0), row(0.1, 0.70, 0.9, stderr=0.0)]
    assert select(rows)["theta"] == 0.1


def test_a_tie_in_execution_goes_to_the_higher_accuracy() -> None:
    rows = [row(0.5, 0.69, 0.6), row(0.4, 0.70, 0.6), row(0.3, 0.695, 0.6)]
    assert select(rows)["theta"] == 0.4


def test_the_order_of_rows_doesnt_matter() -> None:
    rows = [row(0.5, 0.65, 0.5), row(0.3, 0.69, 0.6), row(0.01, 0.70, 1.0)]
    assert select(rows) == select(rows[::-1])


def test_a_grid_of_one() -> None:
    assert select([row(0.5, 0.1, 0.5)])["theta"] == 0.5


def test_nothing_to_select_from() -> None:
    with pytest.raises(ValueError, match="sweep the calibration split"):
        select([])


def test_the_ends_of_the_range_are_thresholds() -> None:
    check_thresholds([0.0, 0.5, 1.0])


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), float("inf")])
def test_values_that_are_no_probability(value: float) -> None:
    with pytest.raises(ValueError, match=rf"{value}.*\[0, 1\].*--sweep\.thresholds"):
        check_thresholds([0.5, value])


def test_an_empty_grid() -> None:
    with pytest.raises(ValueError, match=r"empty.*--sweep\.thresholds"):
        check_thresholds([])
