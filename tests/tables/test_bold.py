"""A line is better than another only where the same questions say so, and the seeds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qtale_lightning.results.predictions import Prediction, save_predictions
from qtale_lightning.tables.bold import Side, difference, is_better

Make = Callable[..., Side]


@pytest.fixture
def side(tmp_path: Path) -> Make:
    """A line's answers, right where `right` is 1; nll falls by 1 where they are."""

    def make(name: str, right: np.ndarray, task: str = "facts") -> Side:
        row: Any = {
            "bits": 16, "engine": "none", "theta": 0.5, "split": "validation", "examples": len(right), "protocol": {},
        }  # fmt: skip
        outcomes = [
            Prediction(task, i, 0, (0.0,), {"value": float(r), "nll": 3.0 - float(r)})
            for i, r in enumerate(right)
        ]
        save_predictions(tmp_path / name, row, outcomes)
        return Side(tmp_path / name, row)

    return make


def answers(count: int, of: int = 100) -> np.ndarray:
    return (np.arange(of) < count).astype(float)


def test_a_difference_beyond_chance_counts(side: Make) -> None:
    ours, theirs = [side("a", answers(70))], [side("b", answers(50))]
    assert is_better(ours, theirs, None, "value", "higher")
    assert not is_better(theirs, ours, None, "value", "higher")
    assert is_better(ours, theirs, None, "nll", "lower"), "less nll is better"
    assert not is_better(ours, theirs, None, "nll", "higher")


def test_pairs_resolve_what_averages_can_not(side: Make) -> None:
    # 50 and 58 right of 100 differ by 1.1 standard errors of the two averages; paired, 8 questions are gained and none
    # lost, which chance would do once in 256 times.
    assert is_better([side("a", answers(58))], [side("b", answers(50))], None, "value", "higher")
    shuffled = np.random.default_rng(0).permutation(answers(50))
    assert not is_better([side("a", answers(58))], [side("c", shuffled)], None, "value", "higher")


def test_every_seed_must_agree(side: Make) -> None:
    ours = [side("a0", answers(90)), side("a1", answers(50))]
    theirs = [side("b0", answers(50)), side("b1", answers(52))]
    assert not is_better(ours, theirs, None, "value", "higher"), "the second seed says the opposite"
    theirs[1] = side("b2", answers(30))
    assert is_better(ours, theirs, None, "value", "higher")


def test_seeds_are_averaged_not_pooled(side: Make) -> None:
    # Each seed alone isn't significant; four times the same questions must not make it so.
    rng = np.random.default_rng(1)
    right, other = rng.permutation(answers(58)), rng.permutation(answers(50))
    ours = [side(f"a{i}", right) for i in range(4)]
    theirs = [side(f"b{i}", other) for i in range(4)]
    assert not is_better(ours[:1], theirs[:1], None, "value", "higher")
    assert not is_better(ours, theirs, None, "value", "higher")


def test_a_task_is_judged_by_its_own_questions(side: Make) -> None:
    ours, theirs = [side("a", answers(70), "piqa")], [side("b", answers(50), "piqa")]
    assert is_better(ours, theirs, "piqa", "value", "higher")
    assert not is_better(ours, theirs, "boolq", "value", "higher"), "nobody asked it"


def test_without_predictions_nothing_is_better(side: Make, tmp_path: Path) -> None:
    one = side("a", answers(70))
    assert not is_better([one], [Side(tmp_path / "nowhere", one.row)], None, "value", "higher")


def test_a_difference_has_its_error_and_interval(side: Make) -> None:
    found = difference([side("a", answers(58))], [side("b", answers(50))], None, "value")
    assert found is not None
    assert found.value == pytest.approx(0.08)
    assert found.stderr == pytest.approx((0.08 * 0.92 / 100) ** 0.5, rel=0.05), "that of 8 questions of 100"
    assert 0 < found.low < 0.08 < found.high
    assert found.significant
    seeds = [side("c0", answers(70)), side("c1", answers(60))], [side("d", answers(50))] * 2
    over_seeds = difference(*seeds, None, "value")
    assert over_seeds is not None
    assert over_seeds.value == pytest.approx(0.15)
    assert over_seeds.stderr > 0.05, "what 0.2 and 0.1 leave over seeds, and what 100 questions do"
