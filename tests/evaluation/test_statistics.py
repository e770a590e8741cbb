"""The bootstrap against analytic standard errors, and what pairs show that averages don't."""

import math

import numpy as np
import pytest

from qtale_lightning.evaluation.statistics import (
    ByTask,
    Estimate,
    average,
    average_over_seeds,
    paired_difference_over_seeds,
)

# The standard deviation of 9,999 resamples has a relative error of 1/√(2 · 9,999) = 0.7 %: 4 of these, and the
# bootstrap's own bias of 1/(2n), which is 0.25 % for the smallest task here.
TOLERANCE = 0.03


def hits(seed: int, sizes: dict[str, int], rates: dict[str, float]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {task: (generator.random(n) < rates[task]).astype(float) for task, n in sizes.items()}


def paired_difference(ours: ByTask, theirs: ByTask) -> Estimate:
    return paired_difference_over_seeds([ours], [theirs])


SIZES = {"piqa": 1800, "boolq": 200, "openbookqa": 500}
RATES = {"piqa": 0.7, "boolq": 0.55, "openbookqa": 0.3}


def analytic(values: dict[str, np.ndarray]) -> float:
    """Standard error of a mean over tasks with independent questions."""
    return math.sqrt(sum(v.var(ddof=1) / len(v) for v in values.values())) / len(values)


def test_the_average_weighs_tasks_alike() -> None:
    values = {"piqa": np.ones(1000), "boolq": np.zeros(10)}
    assert average(values) == Estimate(0.5, 0.0, 0.5, 0.5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_standard_error_and_interval_are_the_analytic_ones(seed: int) -> None:
    values = hits(seed, SIZES, RATES)
    found, error = average(values), analytic(values)
    assert found.value == pytest.approx(np.mean([v.mean() for v in values.values()]), abs=1e-12)
    assert found.stderr == pytest.approx(error, rel=TOLERANCE)
    # The ends of a percentile interval are order statistics: noisier than its spread, 3 % of 1.96 errors.
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.1 * error)


def test_questions_are_drawn_within_their_task() -> None:
    """Tasks differ, questions within a task don't: nothing is random, while pooled questions would vary."""
    found = average({"piqa": np.ones(50), "boolq": np.zeros(50), "openbookqa": np.full(50, 0.5)})
    assert found.stderr < 1e-12


def test_the_same_questions_give_the_same_figures() -> None:
    values = hits(0, SIZES, RATES)
    assert average(values) == average(values)
    assert average(values) != average(hits(3, SIZES, RATES))


def test_pairs_show_a_difference_that_two_averages_miss() -> None:
    """One answers 3 % of the questions that the other misses, and all others alike."""
    theirs = hits(0, SIZES, RATES)
    generator = np.random.default_rng(1)
    ours = {task: np.maximum(v, generator.random(len(v)) < 0.03) for task, v in theirs.items()}
    paired = paired_difference(ours, theirs)
    one, other = average(ours), average(theirs)
    assert paired.value == pytest.approx(one.value - other.value, abs=1e-12)
    assert paired.significant
    assert paired.low > 0
    assert one.low < other.high, "the intervals overlap"
    assert abs(one.value - other.value) < 2 * math.hypot(one.stderr, other.stderr), "not told apart unpaired"
    assert paired.stderr == pytest.approx(analytic({t: ours[t] - theirs[t] for t in ours}), rel=TOLERANCE)


def test_the_difference_has_a_sign() -> None:
    theirs = hits(0, SIZES, RATES)
    ours = {task: np.where(np.arange(len(v)) % 10 == 0, 0.0, v) for task, v in theirs.items()}
    worse, better = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert worse.high < 0 < better.low
    assert worse.significant
    assert better.significant
    assert worse.value == -better.value


def test_noise_is_not_significant() -> None:
    found = paired_difference(hits(0, SIZES, RATES), hits(1, SIZES, RATES))
    assert not found.significant
    assert found.low < 0 < found.high


def test_the_same_answers_differ_by_nothing() -> None:
    values = hits(0, SIZES, RATES)
    assert paired_difference(values, values) == Estimate(0.0, 0.0, 0.0, 0.0)
    assert not paired_difference(values, values).significant


@pytest.mark.slow
def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """95 % of 200 draws, so 190 ± 3.1; 4 standard errors, and the percentile interval's small shortfall at n = 60."""
    truth = 0.6
    covered = sum(
        found.low <= truth <= found.high
        for found in (average(hits(seed, {"piqa": 60}, {"piqa": truth})) for seed in range(200))
    )
    assert 175 <= covered <= 199


def test_a_single_question_has_no_spread() -> None:
    assert average({"piqa": np.array([1.0]), "boolq": np.array([0.0])}) == Estimate(0.5, 0.0, 0.5, 0.5)


def test_no_questions() -> None:
    with pytest.raises(ValueError, match="no questions"):
        average({})
    with pytest.raises(ValueError, match=r"no questions.*'boolq': 0"):
        average({"piqa": np.ones(3), "boolq": np.ones(0)})


@pytest.mark.parametrize("theirs", [{"piqa": np.ones(4)}, {"boolq": np.ones(3)}, {}])
def test_other_questions_are_no_pairs(theirs: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="not the same questions"):
        paired_difference({"piqa": np.ones(3)}, theirs)


def test_one_seed_has_the_error_of_its_questions() -> None:
    values = hits(0, SIZES, RATES)
    assert average_over_seeds([values]) == average(values)


def test_seeds_that_agree_on_every_question_add_nothing() -> None:
    """Four times the same answers are the same questions still, not four times as many."""
    values = hits(0, SIZES, RATES)
    assert average_over_seeds([values] * 4).stderr == pytest.approx(analytic(values), rel=TOLERANCE)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_seeds_that_differ_on_all_questions_alike_have_the_error_of_seeds(count: int) -> None:
    levels = np.random.default_rng(count).normal(size=count)
    found = average_over_seeds([{task: np.full(n, x) for task, n in SIZES.items()} for x in levels])
    assert found.value == pytest.approx(levels.mean())
    assert found.stderr == pytest.approx(levels.std(ddof=1) / math.sqrt(count), rel=TOLERANCE)


def test_errors_of_seeds_and_questions_add_up() -> None:
    """What a seed adds to every question, and a question to every seed: two independent sources."""
    questions, levels = hits(0, SIZES, RATES), np.array([-0.03, 0.0, 0.04])
    found = average_over_seeds([{task: v + x for task, v in questions.items()} for x in levels])
    expected = math.hypot(analytic(questions), levels.std(ddof=1) / math.sqrt(3))
    assert found.stderr == pytest.approx(expected, rel=TOLERANCE)


def test_one_seed_that_disagrees_leaves_a_difference_to_chance() -> None:
    """What 2,500 questions show of each seed beyond doubt, three seeds of training don't."""
    theirs = [hits(0, SIZES, RATES)] * 3
    ours = [
        {task: v + x for task, v in seed.items()} for seed, x in zip(theirs, (0.3, 0.2, -0.1), strict=True)
    ]
    assert all(paired_difference(*pair).significant for pair in zip(ours, theirs, strict=True))
    assert not paired_difference_over_seeds(ours, theirs).significant
    ours[2] = {task: v + 0.1 for task, v in theirs[2].items()}
    assert paired_difference_over_seeds(ours, theirs).significant


def test_seeds_answer_the_same_questions() -> None:
    one = hits(0, SIZES, RATES)
    with pytest.raises(ValueError, match="not the same questions for each of 2 seeds"):
        average_over_seeds([one, {**one, "piqa": one["piqa"][:-1]}])
    with pytest.raises(ValueError, match="0 seeds"):
        average_over_seeds([])
