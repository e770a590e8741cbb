"""Log-likelihood scoring of multiple-choice questions."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qtale_lightning.batching import by_length
from qtale_lightning.data.tokenization import EncodedPrompt
from qtale_lightning.evaluation.branches import Branches, trees
from qtale_lightning.finite import NonFiniteError
from qtale_lightning.metrics import ExecutionRatio
from qtale_lightning.models.config import RoutedConfig
from qtale_lightning.models.modeling import RoutedForCausalLM
from qtale_lightning.models.routing import Routing

Threshold = float | Sequence[float] | None
"""θ: one for all layers, or one a routed unit; None is the model's own."""


@dataclass(frozen=True)
class Scores:
    """What a model thinks of questions, in their order.

    Attributes:
        loglikelihoods: Per question, the summed log-likelihood in nats of each choice's tokens.
        execution: Share of computed tokens that executed each layer of the base model, ``(layers,)``; what choices, or
            questions, share is computed, and counted, once.
        tokens: Number of computed tokens.
        seconds: Measured time. Thresholds that are scored together share it: theirs add up to the whole.
        sublayers: `execution` of each layer's attention and MLP, ``(2 · layers,)``, where they are decided about apart.
    """

    loglikelihoods: list[np.ndarray]
    execution: list[float]
    tokens: int
    seconds: float
    sublayers: list[float] | None = None

    @property
    def units(self) -> list[float]:
        """`execution` of what is decided about, as `cost` takes it."""
        return self.sublayers or self.execution


def score(
    model: RoutedForCausalLM,
    questions: Sequence[EncodedPrompt],
    threshold: Threshold = None,
    batch_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda questions: None,
) -> Scores:
    """:func:`score_thresholds` of a single θ."""
    return score_thresholds(model, questions, [threshold], batch_tokens, on_progress)[0]


@torch.inference_mode()
def score_thresholds(
    model: RoutedForCausalLM,
    questions: Sequence[EncodedPrompt],
    thresholds: Sequence[Threshold],
    batch_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda questions: None,
    observe: Callable[[Routing], None] = lambda routing: None,
) -> list[Scores]:
    """Score every choice of every question at every θ in packed execution; as scoring at each θ alone, but faster.

    A question's prompt is computed once, in one sequence with its choices, which see it and not each other. So is what
    questions share, where that is most of their prompts, as few-shot examples are. It is exact for routed models, too:
    routing is causal, so a prompt's decisions are the same for every choice. Layers in front of the first at which a θ
    differs from the one before it can't differ either, and aren't computed again: those without a router for different
    θ, and more for θ that differ in late layers only.

    Args:
        model: In evaluation mode.
        questions: Encoded; see :func:`qtale_lightning.data.tokenization.encode_prompt`.
        thresholds: At least one.
        batch_tokens: Tokens (padding included) of a batch; changes no score beyond floating-point noise. None:
            1024 on a CPU, where small batches stay in its caches, else 8192.
        on_progress: Called with the number of questions finished since the last call.
        observe: Called after each forward pass with its routing.

    Raises:
        NonFiniteError: An answer's log-likelihood isn't finite: nothing can be chosen by it.
    """
    count = len(thresholds)
    # Scoring runs on one process, also where training ran on many.
    ratios = [
        ExecutionRatio(
            len(model.model.layers),
            model.config.dropped_layers,
            model.config.unit_shares,
            sync_on_compute=False,
        ).to(model.device)
        for _ in thresholds
    ]
    apart = model.config.gates == "sublayer"
    results = [[np.zeros(len(question.contexts)) for question in questions] for _ in thresholds]
    seconds = [0.0] * count
    batch_tokens = batch_tokens or (1024 if model.device.type == "cpu" else 8192)
    found = trees(questions)
    for number, rows in enumerate(by_length([tree.size for tree in found], batch_tokens)):
        batch = [found[row] for row in rows]
        # Who comes first computes what all share: each in turn, so that their times compare.
        order = [(number + turn) % count for turn in range(count)]
        resume = _resume_at(model.config, [thresholds[i] for i in order])
        branches = Branches(questions, batch, model.device)
        routing = branches.routing(keep=resume)
        for i, first in zip(order, resume, strict=True):
            started = time.perf_counter()
            routing.threshold, routing.resume = thresholds[i], first
            values = branches.loglikelihoods(model, routing)
            ratios[i].update(routing)
            observe(routing)
            if not np.isfinite(values).all():
                raise NonFiniteError(
                    f"the model's log-likelihoods aren't finite (θ = {thresholds[i]}, a question of "
                    f"{questions[branches.pairs[0][0]].task}): its weights are damaged, or too large for {model.dtype}"
                )
            for (q, c), value in zip(branches.pairs, values, strict=True):
                results[i][q][c] = value
            seconds[i] += time.perf_counter() - started
        on_progress(len({q for q, _ in branches.pairs}))
    return [
        Scores(
            found,
            ratio.compute().tolist(),
            int(ratio.tokens),
            time_spent,
            ratio.by_unit().tolist() if apart else None,
        )
        for found, ratio, time_spent in zip(results, ratios, seconds, strict=True)
    ]


def _resume_at(config: RoutedConfig, thresholds: Sequence[Threshold]) -> list[int]:
    """The layer at which each θ's pass may resume from the one before it: the first where the two differ."""
    values = [config.thresholds(config.threshold if theta is None else theta) for theta in thresholds]
    last, units = config.num_hidden_layers - 1, len(config.unit_shares)
    return [0] + [
        next((unit // units for unit in config.routed_units if one[unit] != other[unit]), last)
        for one, other in itertools.pairwise(values)
    ]
