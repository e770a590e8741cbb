"""θ for a budget of executed layers: one for all layers, or one a layer, from what calibration questions say."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np

from qtale_lightning.data.tokenization import EncodedPrompt
from qtale_lightning.evaluation.scoring import Scores, score_thresholds
from qtale_lightning.models.modeling import RoutedForCausalLM
from qtale_lightning.models.routing import Routing
from qtale_lightning.routing.router import EXECUTE, SKIP

TOLERANCE = 0.005
"""How near to the budget the execution ratio on the calibration questions must come."""
MAX_PASSES = 16
_SUGGESTIONS = 3  # ratios that a failed search tries to name instead, at up to as many passes each
STEP = 0.1
"""Share of a layer's decisions that its θ is moved by, to see what they are worth."""

Theta = float | list[float]


class UnmetBudgetError(ValueError):
    """No θ meets a budget; the message says what can be had."""


@dataclass(frozen=True)
class Pass:
    """What one pass over the calibration questions at one θ says.

    Attributes:
        ratio: Share of layers executed, over all computed tokens and all layers.
        nll: Of the gold answers, mean over tasks, nats a token.
        decisions: Layers × computed tokens, what `ratio` is a share of.
        gaps: By routed unit, log(p / (1 − p)) of p(execute) at every decision that a router takes, ``(decisions,)``; of
            a pass that was watched.
        scores: Of the questions.
        shares: Of a layer's units, as `architectures.unit_shares` gives them: what a decision is worth of `decisions`.
    """

    ratio: float
    nll: float
    decisions: int
    gaps: list[np.ndarray]
    scores: Scores
    shares: Sequence[float] = (1.0,)

    @property
    def worth(self) -> list[float]:
        """What a decision is worth, by routed unit."""
        return [self.shares[unit % len(self.shares)] for unit in range(len(self.gaps))]


@dataclass(frozen=True)
class Found:
    """A θ within `TOLERANCE` of its budget, and its pass."""

    theta: Theta
    at: Pass


class Passes(Protocol):
    """Whatever makes passes over calibration questions."""

    def watch(self, theta: Theta) -> Pass:
        """A pass that records p(execute)."""
        ...

    def compare(self, thetas: Sequence[Theta]) -> list[Pass]:
        """Passes at several θ."""
        ...


class Calibration:
    """Passes over calibration questions, counted.

    Args:
        model: In evaluation mode.
        questions: To ask.
        nll: Of the gold answers, from a pass's scores.
        bar: Progress bar of passes at these θ; yields the function that advances it by questions.

    Attributes:
        passes: Made so far, each at one θ.
        seconds: Spent in them.
    """

    def __init__(
        self,
        model: RoutedForCausalLM,
        questions: Sequence[EncodedPrompt],
        nll: Callable[[Scores], float],
        bar: Callable[[Sequence[Theta]], AbstractContextManager[Callable[[int], None]]],
    ) -> None:
        self.model, self.questions, self.nll, self.bar = model, questions, nll, bar
        self.passes, self.seconds = 0, 0.0

    def watch(self, theta: Theta) -> Pass:
        """A pass that records p(execute)."""
        gaps: list[list[np.ndarray]] = [[] for _ in self.model.config.routed_units]

        def observe(routing: Routing) -> None:
            for unit, (_, logits) in zip(gaps, sorted(routing.logits.items()), strict=True):
                unit.append((logits[..., EXECUTE] - logits[..., SKIP])[routing.free].cpu().numpy())

        (seen,) = self._passes([theta], observe)
        return replace(seen, gaps=[np.concatenate(unit) for unit in gaps])

    def compare(self, thetas: Sequence[Theta]) -> list[Pass]:
        """Passes at several θ; the more of the first layers neighbours have in common, the faster."""
        return self._passes(thetas)

    def _passes(
        self, thetas: Sequence[Theta], observe: Callable[[Routing], None] = lambda routing: None
    ) -> list[Pass]:
        with self.bar(thetas) as advance:
            found = score_thresholds(self.model, self.questions, thetas, on_progress=advance, observe=observe)
        self.passes, self.seconds = self.passes + len(found), self.seconds + sum(s.seconds for s in found)
        return [
            Pass(
                ratio=sum(scores.execution) / len(scores.execution),
                nll=self.nll(scores),
                decisions=len(scores.execution) * scores.tokens,
                gaps=[],
                scores=scores,
                shares=self.model.config.unit_shares,
            )
            for scores in found
        ]


def find_threshold(calibration: Passes, budget: float) -> Found:
    """The θ whose execution ratio is within `TOLERANCE` of the budget; deterministic.

    θ is searched as its logit t, which what is skipped grows with. Every pass gives the whole distribution of
    p(execute) at its t. The t that would meet the budget, were that distribution the same at every t, is the next;
    it isn't quite, since states change with what was skipped. Where that leaves the bracket of a t that executes too
    much and one that executes too little, or doesn't halve the error, the bracket's middle is the next.

    Args:
        calibration: Makes the passes.
        budget: Share of layers to execute, in (0, 1].

    Raises:
        UnmetBudgetError: No θ meets it; the message gives ratios that can be had: of those that were met on the way,
            such that a search for them meets them again, which is tried.
    """
    made: dict[str, Pass] = {}

    def watch(theta: Theta) -> Pass:
        if str(theta) not in made:
            made[str(theta)] = calibration.watch(theta)
        return made[str(theta)]

    found = search_threshold(watch, budget)
    if found is not None:
        return found
    near = sorted((seen.ratio for seen in made.values()), key=lambda ratio: abs(ratio - budget))
    named = list(dict.fromkeys(f"{ratio:.3f}" for ratio in near))[:_SUGGESTIONS]
    met = [ratio for ratio in named if search_threshold(watch, float(ratio)) is not None]
    which = f"a ratio that is met, such as {' or '.join(met)}" if met else "another ratio"
    raise UnmetBudgetError(
        f"no threshold found for an execution ratio of {budget:g} ± {TOLERANCE} in {MAX_PASSES} passes: it jumps near "
        f"there. Give --sweep.budgets {which}"
    )


def search_threshold(
    watch: Callable[[Theta], Pass], budget: float, by_layer: Sequence[float] | None = None
) -> Found | None:
    """The search of :func:`find_threshold`; None where it doesn't meet the budget in `MAX_PASSES`.

    Args:
        watch: Makes a pass.
        budget: Share of layers to execute, in (0, 1].
        by_layer: θ by routed unit to start from: t is then added to the logit of each. None: one θ for all.

    Raises:
        UnmetBudgetError: The budget is below what always executes.
    """
    offsets = None if by_layer is None else [_logit(theta) for theta in by_layer]
    low, high, t, last_error = -math.inf, math.inf, 0.0, math.inf
    for _ in range(MAX_PASSES):
        theta = _theta(t) if offsets is None else [_theta(t + offset) for offset in offsets]
        seen = watch(theta)
        error = seen.ratio - budget
        if abs(error) <= TOLERANCE:
            return Found(theta, seen)
        decided = sum(worth * len(gap) for worth, gap in zip(seen.worth, seen.gaps, strict=True))
        floor = 1 - decided / seen.decisions
        if budget < floor - TOLERANCE:
            raise UnmetBudgetError(
                f"an execution ratio of {budget:g} can't be reached: reserved tokens and layers without a router "
                f"execute always, {floor:.3f} of all. Give --sweep.budgets above that"
            )
        low, high = (t, high) if error > 0 else (low, t)
        proposed = _quantile(seen, offsets, budget)
        slow = abs(error) > last_error / 2
        if not low < proposed < high or (slow and math.isfinite(low) and math.isfinite(high)):
            proposed = (low + high) / 2
        t, last_error = proposed, abs(error)
    return None


def _quantile(seen: Pass, offsets: Sequence[float] | None, budget: float) -> float:
    """The t at which the budget would be met, were p(execute) distributed as in this pass."""
    margins = np.concatenate(
        [gap - offset for gap, offset in zip(seen.gaps, offsets or [0.0] * len(seen.gaps), strict=True)]
    )
    order = margins.argsort()
    worth = np.repeat(seen.worth, [len(gap) for gap in seen.gaps])[order]
    # A decision at t itself executes: those before it, in order, are to be worth what is skipped, to the nearest.
    skipped = int(np.searchsorted(worth.cumsum() - worth / 2, (1 - budget) * seen.decisions))
    return float(margins[order[min(skipped, len(margins) - 1)]])


def find_layer_thresholds(calibration: Passes, budget: float) -> Found:
    """θ of every routed unit: decisions go where they lower the calibration nll most a share of execution.

    Units are layers, or where sublayers are decided about apart, these.

    From the common θ of the budget, each layer's θ alone is moved so that `STEP` of its decisions more, then less, are
    'execute', and the change of nll and of execution is measured: 2 passes a layer, which compute only what lies
    behind the layer. Then every layer takes, of more, less and unchanged, what is best at one price of execution
    for all layers, the lowest at which the budget holds (the measured changes are taken to add up); at last t is
    searched anew as in :func:`find_threshold`. The common θ stays where that doesn't lower the nll, or meets nothing.

    Raises:
        UnmetBudgetError: as `find_threshold`.
    """
    common = find_threshold(calibration, budget)
    assert isinstance(common.theta, float)
    base = [common.theta] * len(common.at.gaps)
    moves = [
        (layer, theta)
        for layer in reversed(range(len(base)))
        for theta in _steps(common.at.gaps[layer], common.theta)
    ]
    probes: list[Theta] = [[*base[:layer], theta, *base[layer + 1 :]] for layer, theta in moves]
    options: list[list[Option]] = [[(0.0, 0.0, common.theta)] for _ in base]
    for (layer, theta), probe in zip(moves, calibration.compare(probes) if probes else [], strict=True):
        options[layer].append((probe.ratio - common.at.ratio, probe.nll - common.at.nll, theta))
    chosen = [theta for _, _, theta in cheapest(options)]
    found = search_threshold(calibration.watch, budget, chosen) if chosen != base else None
    return found if found is not None and found.at.nll < common.at.nll else common


Option = tuple[float, float, float]
"""Change of the execution ratio, change of the nll, θ."""


def cheapest(options: Sequence[Sequence[Option]]) -> list[Option]:
    """One option a layer, of least nll at the lowest price μ ≥ 0 of execution at which it doesn't grow.

        argmin_o  nll(o) + μ · ratio(o)   in every layer, with  Σ ratio(o) ≤ 0

    This is the Lagrangian relaxation of choosing under a budget: of all choices that execute as little as the one it
    returns, none has a lower nll.
    """
    # Choices change only at the prices at which two options of a layer are worth the same.
    prices = {0.0} | {
        price
        for layer in options
        for ratio, nll, _ in layer
        for other_ratio, other_nll, _ in layer
        if ratio != other_ratio and (price := (nll - other_nll) / (other_ratio - ratio)) > 0
    }
    for price in sorted(prices):
        chosen = [min(layer, key=partial(_worth, price)) for layer in options]
        if sum(ratio for ratio, _, _ in chosen) <= 0:
            return chosen
    return [min(layer) for layer in options]


def _worth(price: float, option: Option) -> tuple[float, float]:
    """What an option costs at a price of execution; of equal ones the one that executes less is first."""
    ratio, nll, _ = option
    return nll + price * ratio, ratio


def _steps(gaps: np.ndarray, theta: float) -> list[float]:
    """The θ at which `STEP` more, and less, of a layer's decisions are 'execute'; fewer at the ends, none if none."""
    ordered, now = np.sort(gaps), int((gaps < _logit(theta)).sum())
    step = round(STEP * len(gaps))
    skipped = {max(now - step, 0), min(now + step, len(gaps) - 1)} - {now}
    return [_theta(float(ordered[count])) for count in sorted(skipped)]


def _logit(theta: float) -> float:
    return math.log(theta / (1 - theta))


def _theta(t: float) -> float:
    """The θ of a logit, in (0, 1), to the 6 digits that tables show: what is shown is what was measured."""
    return min(float(f"{1 / (1 + math.exp(-max(t, -600))):.6g}"), 0.999999)
