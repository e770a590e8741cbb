"""The rules on a grid, and what options are refused."""

import math
from typing import Any

import pytest

from qtale_lightning.evaluation.options import Rule, SweepOptions
from qtale_lightning.evaluation.statistics import Estimate
from qtale_lightning.evaluation.threshold import (
    budget_in_words,
    tolerance_in_words,
    within_one_standard_error,
    within_tolerance,
)


def row(theta: float, average: float, ratio: float, stderr: float = 0.02) -> dict[str, Any]:
    return {"theta": theta, "average": average, "average_stderr": stderr, "execution_ratio": ratio}


def test_the_cheapest_row_within_one_standard_error_of_the_best() -> None:
    rows = [row(0.5, 0.65, 0.5), row(0.3, 0.69, 0.6), row(0.1, 0.695, 0.8), row(0.01, 0.70, 1.0)]
    assert within_one_standard_error(rows)["theta"] == 0.3


def test_the_best_rows_own_error_is_the_yardstick() -> None:
    rows = [row(0.5, 0.65, 0.5, stderr=0.5), row(0.1, 0.70, 0.9, stderr=0.02)]
    assert within_one_standard_error(rows)["theta"] == 0.1


def test_just_inside_and_just_outside_one_standard_error() -> None:
    """With powers of two, so that the bound is exact."""
    best = row(0.1, 0.75, 0.9, stderr=0.25)
    assert within_one_standard_error([row(0.5, 0.5, 0.5), best])["theta"] == 0.5
    assert within_one_standard_error([row(0.5, 0.499, 0.5), best])["theta"] == 0.1


def test_without_error_only_the_best_is_good() -> None:
    rows = [row(0.5, 0.69, 0.5, stderr=0.0), row(0.1, 0.70, 0.9, stderr=0.0)]
    assert within_one_standard_error(rows)["theta"] == 0.1


def test_a_tie_in_execution_goes_to_the_higher_accuracy() -> None:
    rows = [row(0.5, 0.69, 0.6), row(0.4, 0.70, 0.6), row(0.3, 0.695, 0.6)]
    assert within_one_standard_error(rows)["theta"] == 0.4


def test_the_order_of_rows_doesnt_matter() -> None:
    rows = [row(0.5, 0.65, 0.5), row(0.3, 0.69, 0.6), row(0.01, 0.70, 1.0)]
    assert within_one_standard_error(rows) == within_one_standard_error(rows[::-1])


def test_a_grid_of_one() -> None:
    assert within_one_standard_error([row(0.5, 0.1, 0.5)])["theta"] == 0.5


def test_nothing_to_select_from() -> None:
    with pytest.raises(ValueError, match="sweep the calibration split"):
        within_one_standard_error([])


def test_the_ends_of_the_range_are_thresholds() -> None:
    SweepOptions((0.0, 0.5, 1.0))


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), float("inf")])
def test_values_that_are_no_probability(value: float) -> None:
    with pytest.raises(ValueError, match=rf"--sweep\.thresholds {value}: must be >= 0 and <= 1"):
        SweepOptions((0.5, value))


def test_an_empty_grid() -> None:
    with pytest.raises(ValueError, match=r"empty.*--sweep\.thresholds"):
        SweepOptions(())


def test_without_an_average_accuracy_nll_decides() -> None:
    """As where a task reports a perplexity: the lowest is best."""
    rows = [
        {
            "theta": theta,
            "average": None,
            "average_nll": nll,
            "average_nll_stderr": 0.03,
            "execution_ratio": ratio,
        }
        for theta, nll, ratio in ((0.5, 1.10, 0.5), (0.3, 1.02, 0.6), (0.1, 1.0, 0.9))
    ]
    assert within_one_standard_error(rows)["theta"] == 0.3


# -------------------------------------------------------------------------------------------------- tolerance


def interval(low: float, high: float) -> Estimate:
    return Estimate((low + high) / 2, (high - low) / 3.92, low, high)


NOTHING = interval(0.0, 0.0)
ROWS = [row(0.5, 0.60, 0.5), row(0.3, 0.68, 0.7), row(0.1, 0.69, 0.9), row(0.0, 0.70, 1.0)]


@pytest.mark.parametrize(
    ("differences", "margin", "theta"),
    [
        # Not significantly worse: the interval's upper end reaches 0.
        ([interval(-0.15, -0.05), interval(-0.05, 0.01), interval(-0.03, 0.01), NOTHING], None, 0.3),
        ([interval(-0.15, -0.05), interval(-0.05, 0.0), interval(-0.03, 0.01), NOTHING], None, 0.3),
        ([interval(-0.15, -0.05), interval(-0.05, -1e-9), interval(-0.03, 0.01), NOTHING], None, 0.1),
        ([interval(-0.15, 0.001), interval(-0.05, -1e-9), interval(-0.03, 0.01), NOTHING], None, 0.5),
        ([interval(-0.15, -0.05), interval(-0.05, -0.01), interval(-0.03, -0.01), NOTHING], None, 0.0),
        # With a margin the whole interval is above −margin: significantly worse may be good enough, and unclear is not.
        ([interval(-0.15, -0.05), interval(-0.05, -0.01), interval(-0.03, 0.01), NOTHING], 0.04, 0.1),
        ([interval(-0.15, -0.05), interval(-0.039, -0.01), interval(-0.03, 0.01), NOTHING], 0.04, 0.3),
        ([interval(-0.15, 0.2), interval(-0.04, 0.01), interval(-0.03, 0.01), NOTHING], 0.04, 0.1),
        ([interval(-0.15, -0.05), interval(-0.05, 0.01), interval(-0.03, 0.01), NOTHING], 0.01, 0.0),
    ],
)  # fmt: skip
def test_the_cheapest_row_within_the_tolerance(
    differences: list[Estimate], margin: float | None, theta: float
) -> None:
    assert within_tolerance(ROWS, differences, margin)["theta"] == theta
    assert within_tolerance(ROWS[::-1], differences[::-1], margin)["theta"] == theta


def test_equal_cost_goes_to_the_higher_accuracy() -> None:
    rows = [row(0.5, 0.69, 0.6), row(0.4, 0.70, 0.6), row(0.0, 0.70, 1.0)]
    assert within_tolerance(rows, [NOTHING] * 3, None)["theta"] == 0.4


def test_tolerance_without_full_execution_to_compare_with() -> None:
    with pytest.raises(ValueError, match="full execution"):
        within_tolerance(ROWS[:-1], [NOTHING] * 3, None)


def test_rules_say_what_they_did() -> None:
    assert "isn't significantly below 0" in tolerance_in_words(None)
    assert "above −1 points" in tolerance_in_words(0.01)
    assert "0.7 ± 0.005" in budget_in_words(0.7, by_layer=False)
    assert "for each layer" in budget_in_words(0.7, by_layer=True)


# ---------------------------------------------------------------------------------------------------- options


def test_full_execution_is_measured_where_the_rule_needs_it() -> None:
    assert SweepOptions((0.1, 0.5)).grid() == [0.5, 0.1]
    assert SweepOptions((0.1, 0.5), "tolerance").grid() == [0.5, 0.1, 0.0]
    assert SweepOptions((0.0, 0.5), "tolerance").grid() == [0.5, 0.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"thresholds": ()}, "--sweep.thresholds"),
        ({"rule": "budget"}, "--sweep.rule budget needs --sweep.budgets"),
        ({"rule": "layer-budget"}, "--sweep.rule layer-budget needs --sweep.budgets"),
        ({"rule": "budget", "budgets": (0.0,)}, r"--sweep.budgets 0.0: must be > 0 and <= 1"),
        ({"rule": "budget", "budgets": (0.7, 1.2)}, r"--sweep.budgets 1.2: must be > 0 and <= 1"),
        ({"rule": "tolerance", "margin": 0.0}, r"--sweep.margin 0.0: must be > 0 and < 1"),
        ({"rule": "tolerance", "margin": 1.0}, r"--sweep.margin 1.0: must be > 0 and < 1"),
    ],
)
def test_options_that_cant_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SweepOptions(**({"thresholds": (0.5,)} | options))


@pytest.mark.parametrize("rule", ["budget", "layer-budget"])
def test_a_budget_that_layers_without_a_router_exceed(rule: Rule) -> None:
    options = SweepOptions((0.5,), rule, (0.7, 0.2))
    options.check_budgets(0.2)
    for unrouted, said in ((0.25, "0.250"), (math.nan, "nan")):
        with pytest.raises(ValueError, match=rf"--sweep.budgets 0\.\d can't be reached.*{said} of all"):
            options.check_budgets(unrouted)


def test_budgets_of_another_rule_are_left_alone() -> None:
    """A run's configuration may have them from an earlier sweep."""
    SweepOptions((0.5,), "tolerance", (0.1,)).check_budgets(0.25)
