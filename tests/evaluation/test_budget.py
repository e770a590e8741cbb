"""θ for a budget: the search on made-up and on a model's decisions, and the choice of a θ for each layer."""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qtale_lightning.data import EncodedPrompt
from qtale_lightning.evaluation.budget import (
    TOLERANCE,
    Calibration,
    Option,
    Pass,
    Theta,
    UnmetBudgetError,
    cheapest,
    find_layer_thresholds,
    find_threshold,
    search_threshold,
)
from qtale_lightning.evaluation.scoring import Scores, score
from qtale_lightning.models import RoutedForCausalLM
from tests.llama import llama_config

NO_SCORES = Scores([], [], 0, 0.0)


class Decisions:
    """Made-up passes: 4 routed layers of 6, whose p(execute) falls with what the layers before them skipped.

    Args:
        feedback: By how many logits, where all is skipped.
        worth: By layer, the nll that skipping it altogether costs.
        step: Gaps are multiples of this; 0 leaves them as they are.
    """

    def __init__(
        self, feedback: float = 0.0, worth: Sequence[float] = (0.1, 0.1, 0.1, 0.1), step: float = 0.0
    ) -> None:
        generator = np.random.default_rng(0)
        centers, widths = [2.0, 0.5, -1.0, 0.0], [1.0, 2.0, 0.5, 1.5]
        self.gaps = [generator.normal(c, w, 2000) for c, w in zip(centers, widths, strict=True)]
        if step:
            self.gaps = [np.round(gap / step) * step for gap in self.gaps]
        self.feedback, self.worth = feedback, worth
        self.watched: list[Theta] = []
        self.compared: list[Theta] = []

    def at(self, theta: Theta) -> Pass:
        by_layer = theta if isinstance(theta, list) else [theta] * 4
        gaps, executed, nll = [], [], 1.0
        for gap, one, worth in zip(self.gaps, by_layer, self.worth, strict=True):
            gap = gap - self.feedback * (1 - np.mean(executed)) if executed else gap
            gaps.append(gap)
            executed.append(float((gap >= math.log(one / (1 - one))).mean()))
            nll += worth * (1 - executed[-1])
        ratio = (2 + sum(0.1 + 0.9 * share for share in executed)) / 6  # a tenth of the tokens is reserved
        return Pass(ratio, nll, decisions=round(6 * 2000 / 0.9), gaps=gaps, scores=NO_SCORES)

    def watch(self, theta: Theta) -> Pass:
        self.watched.append(theta)
        return self.at(theta)

    def compare(self, thetas: Sequence[Theta]) -> list[Pass]:
        self.compared += thetas
        return [replace(self.at(theta), gaps=[]) for theta in thetas]


# ---------------------------------------------------------------------------------------------- one θ for all


@pytest.mark.parametrize("feedback", [0.0, 1.0, -1.0, 4.0])
@pytest.mark.parametrize("budget", [0.42, 0.5, 0.65, 0.8, 0.95, 0.99, 1.0])
def test_the_ratio_is_met_in_a_few_passes(budget: float, feedback: float) -> None:
    calibration = Decisions(feedback)
    found = find_threshold(calibration, budget)
    assert abs(found.at.ratio - budget) <= TOLERANCE
    assert found.at.ratio == calibration.at(found.theta).ratio
    assert len(calibration.watched) <= (2 if feedback == 0 else 8)
    assert all(0 < theta < 1 for theta in calibration.watched)


def test_without_feedback_the_second_pass_is_the_last() -> None:
    """The distribution of p(execute) says at once where the quantile is."""
    calibration = Decisions()
    find_threshold(calibration, 0.8)
    assert calibration.watched[0] == 0.5
    assert len(calibration.watched) == 2


def test_the_search_is_deterministic_and_says_what_tables_show() -> None:
    one, other = Decisions(1.0), Decisions(1.0)
    assert find_threshold(one, 0.7).theta == find_threshold(other, 0.7).theta
    assert one.watched == other.watched
    assert all(float(f"{theta:g}") == theta for theta in one.watched)


def test_a_lower_budget_has_a_higher_threshold() -> None:
    thetas = [find_threshold(Decisions(1.0), budget).theta for budget in (0.9, 0.7, 0.5)]
    assert thetas == sorted(thetas)  # type: ignore[type-var]


def test_thresholds_by_layer_are_moved_together() -> None:
    """By the same number of logits."""
    start = [0.5, 0.2, 0.6, 0.3]
    calibration = Decisions(1.0)
    found = search_threshold(calibration.watch, 0.6, start)
    assert found is not None
    assert abs(found.at.ratio - 0.6) <= TOLERANCE
    assert calibration.watched[0] == start
    assert isinstance(found.theta, list)
    moves = [math.log(t / (1 - t)) - math.log(s / (1 - s)) for t, s in zip(found.theta, start, strict=True)]
    assert moves == pytest.approx([moves[0]] * 4, abs=1e-4)  # 6 digits of θ


def test_a_budget_below_what_always_executes() -> None:
    """2 of 6 layers, and the reserved tenth of 4: 0.4."""
    calibration = Decisions()
    with pytest.raises(
        ValueError, match=r"0\.3 can't be reached.*0\.400 of all.*--sweep\.budgets above that"
    ):
        find_threshold(calibration, 0.3)
    assert len(calibration.watched) == 1, "no pass is wasted on it"


def test_a_ratio_that_decisions_jump_over() -> None:
    """Gaps of ±4 and 0 only: the message names the ratios on both sides of the jump."""
    calibration = Decisions(step=4.0)
    with pytest.raises(
        ValueError, match=r"no threshold found.* 0\.8 .*it jumps near there.*such as"
    ) as refusal:
        find_threshold(calibration, 0.8)
    named = [float(word) for word in str(refusal.value).split("such as ")[1].split(" or ")]
    assert len(named) == 2
    for ratio in named:
        assert abs(find_threshold(calibration, ratio).at.ratio - ratio) <= TOLERANCE


@pytest.mark.parametrize(
    ("feedback", "step", "budget", "missed"),
    [(4.0, 1.0, 0.7, "0.676"), (-4.0, 1.0, 0.59, "0.607"), (-1.0, 2.0, 0.82, "0.826")],
)
def test_a_ratio_is_suggested_only_where_its_search_meets_it(
    feedback: float, step: float, budget: float, missed: str
) -> None:
    """Each of these searches passes a ratio that a search for it doesn't find again: states change with θ."""
    with pytest.raises(UnmetBudgetError) as refusal:
        find_threshold(Decisions(feedback, step=step), budget)
    named = str(refusal.value).split("such as ")[1].split(" or ")
    assert missed not in named
    for ratio in named:
        find_threshold(Decisions(feedback, step=step), float(ratio))


# ------------------------------------------------------------------------------------------- a θ for each layer


def brute_force(options: Sequence[Sequence[Option]], limit: float) -> float:
    """The lowest nll of all choices whose execution grows by at most this."""
    return min(
        sum(nll for _, nll, _ in chosen)
        for chosen in itertools.product(*options)
        if sum(ratio for ratio, _, _ in chosen) <= limit + 1e-12
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_of_those_that_cost_as_much(seed: int) -> None:
    generator = np.random.default_rng(seed)
    options: list[list[Option]] = []
    for _ in range(6):
        less, more = generator.uniform(0.5, 1.5, 2)
        options.append(
            [
                (0.0, 0.0, 0.5),
                (-less, float(generator.normal(0.5, 1.0)), 0.6),
                (more, float(generator.normal(-0.5, 1.0)), 0.4),
            ]
        )
    chosen = cheapest(options)
    spent = sum(ratio for ratio, _, _ in chosen)
    assert spent <= 0
    assert sum(nll for _, nll, _ in chosen) == pytest.approx(brute_force(options, spent))


def test_what_helps_and_saves_is_always_taken() -> None:
    assert cheapest([[(0.0, 0.0, 0.5), (-0.1, -0.2, 0.6), (0.1, 0.3, 0.4)]]) == [(-0.1, -0.2, 0.6)]


def test_one_layer_gives_what_another_is_worth_more_for() -> None:
    unchanged = (0.0, 0.0, 0.5)
    dear = [unchanged, (-0.1, 0.5, 0.6), (0.1, -0.5, 0.4)]
    cheap = [unchanged, (-0.1, 0.01, 0.6), (0.1, -0.01, 0.4)]
    assert cheapest([dear, cheap, [unchanged]]) == [dear[2], cheap[1], unchanged]


def test_execution_moves_to_the_layers_that_need_it() -> None:
    """Layers of equal cost and unequal worth, at the same execution ratio."""
    calibration = Decisions(worth=(0.0, 1.0, 0.5, 0.0))
    common, found = find_threshold(calibration, 0.7), find_layer_thresholds(calibration, 0.7)
    assert isinstance(found.theta, list)
    assert abs(found.at.ratio - 0.7) <= TOLERANCE
    assert found.at.nll < common.at.nll - 0.05
    assert found.theta[1] < common.theta < found.theta[0]  # type: ignore[operator]
    assert found.theta[3] > common.theta  # type: ignore[operator]


def test_it_takes_two_passes_a_layer_from_the_last_to_the_first() -> None:
    calibration = Decisions(worth=(0.0, 1.0, 0.5, 0.0))
    common = find_threshold(calibration, 0.7).theta
    find_layer_thresholds(calibration, 0.7)
    moved = [
        next(layer for layer, one in enumerate(theta) if one != common)
        for theta in calibration.compared
        if isinstance(theta, list)
    ]
    assert moved == [3, 3, 2, 2, 1, 1, 0, 0]
    assert all(sum(one != common for one in theta) == 1 for theta in calibration.compared)  # type: ignore[union-attr]


def test_the_common_threshold_stays_where_nothing_is_gained() -> None:
    """All decisions are worth the same."""
    calibration = Decisions(worth=(0.1, 0.1, 0.1, 0.1))
    found = find_layer_thresholds(calibration, 0.7)
    assert found.at.nll <= find_threshold(calibration, 0.7).at.nll


# ------------------------------------------------------------------------------------------------ a real model


ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,  # large enough for decisions that differ between tokens
}


@pytest.fixture(scope="module")
def model() -> RoutedForCausalLM:
    """Random weights, routers of mixed decisions, which differ from layer to layer."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(llama_config(**ARCHITECTURE, router_width=16, start_layer=1))
    for index, layer in enumerate(made.model.layers[1:]):
        nn.init.normal_(layer.router.out.weight, 0.0, 1.0)
        nn.init.constant_(layer.router.out.bias, 0.0)
        layer.router.out.bias.data[1] = index / 2 - 1.0
    return made.eval()


def asked(seed: int, count: int) -> list[EncodedPrompt]:
    """Questions of 3 choices, from the same distribution for every seed."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(0, 97, (length,), generator=generator).tolist())

    return [
        EncodedPrompt(
            "facts", number % 3, (tokens(8, 30),) * 3, tuple(tokens(1, 6) for _ in range(3)), (4,) * 3
        )
        for number in range(count)
    ]


def nll_of(questions: Sequence[EncodedPrompt]) -> Callable[[Scores], float]:
    def nll(scores: Scores) -> float:
        values = zip(questions, scores.loglikelihoods, strict=True)
        return float(np.mean([-ll[q.label] / len(q.continuations[q.label]) for q, ll in values]))

    return nll


@pytest.fixture
def calibration(model: RoutedForCausalLM) -> Calibration:
    questions = asked(0, 60)
    return Calibration(model, questions, nll_of(questions), lambda thetas: nullcontext(lambda count: None))


def ratio(scores: Scores) -> float:
    return sum(scores.execution) / len(scores.execution)


@pytest.mark.parametrize("budget", [0.35, 0.5, 0.7, 0.9])
def test_the_ratio_holds_on_questions_that_werent_asked(
    model: RoutedForCausalLM, calibration: Calibration, budget: float
) -> None:
    """Within 0.005 on the calibration questions, by definition, and within 0.02 on others."""
    found = find_threshold(calibration, budget)
    assert abs(ratio(score(model, calibration.questions, found.theta)) - budget) <= 0.005
    assert abs(ratio(score(model, asked(1, 60), found.theta)) - budget) <= 0.02
    assert calibration.passes <= 6


def test_a_pass_sees_what_the_model_decides(model: RoutedForCausalLM, calibration: Calibration) -> None:
    """Its gaps give the execution ratio at its own θ, and the questions' scores are those of scoring."""
    seen = calibration.watch(0.4)
    scores = score(model, calibration.questions, 0.4)
    skipped = sum(int((gap < math.log(0.4 / 0.6)).sum()) for gap in seen.gaps)
    assert len(seen.gaps) == 7
    assert 0.1 < seen.ratio < 0.9
    assert seen.ratio == pytest.approx(1 - skipped / seen.decisions, abs=1e-6)
    assert seen.ratio == ratio(scores)
    assert seen.nll == nll_of(calibration.questions)(scores)
    assert all(map(np.array_equal, seen.scores.loglikelihoods, scores.loglikelihoods))
    assert calibration.passes == 1
    assert calibration.seconds == seen.scores.seconds


def test_layers_get_thresholds_of_their_own(model: RoutedForCausalLM, calibration: Calibration) -> None:
    """Lower nll than with one θ for all, at the same execution; and each layer's steps share the layers before it."""
    common = find_threshold(calibration, 0.6)
    calls = [0] * 8
    handles = [
        layer.mlp.register_forward_hook(
            lambda *_, i=index: calls.__setitem__(i, calls[i] + 1)  # type: ignore[misc]
        )
        for index, layer in enumerate(model.model.layers)
    ]
    before = calibration.passes
    found = find_layer_thresholds(calibration, 0.6)
    for handle in handles:
        handle.remove()
    passes = calibration.passes - before
    assert isinstance(found.theta, list)
    assert len(found.theta) == 7
    assert abs(found.at.ratio - 0.6) <= TOLERANCE
    assert found.at.nll < common.at.nll
    assert 2 * 7 < passes <= 2 * 7 + 12
    assert calls[0] < 0.6 * calls[7], "the first layer is computed in fewer passes than the last"
