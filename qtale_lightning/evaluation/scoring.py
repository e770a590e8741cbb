"""Log-likelihood scoring of multiple-choice questions."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qtale_lightning.data.tokenization import EncodedPrompt
from qtale_lightning.metrics import ExecutionRatio
from qtale_lightning.models.modeling import RoutedLlamaConfig, RoutedLlamaForCausalLM
from qtale_lightning.models.routing import Routing

TokenIds = tuple[int, ...]


Threshold = float | Sequence[float] | None
"""θ: one for all layers, or one a routed layer; None is the model's own."""


@dataclass(frozen=True)
class Scores:
    """What a model thinks of questions, in their order.

    Attributes:
        loglikelihoods: Per question, the summed log-likelihood in nats of each choice's tokens.
        execution: Share of computed tokens that executed each layer, ``(layers,)``; a prompt that choices share is
            computed, and counted, once.
        tokens: Number of computed tokens.
        seconds: Measured time. Thresholds that are scored together share it: theirs add up to the whole.
    """

    loglikelihoods: list[np.ndarray]
    execution: list[float]
    tokens: int
    seconds: float


def score(
    model: RoutedLlamaForCausalLM,
    questions: Sequence[EncodedPrompt],
    threshold: Threshold = None,
    batch_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda questions: None,
) -> Scores:
    """:func:`score_thresholds` of a single θ."""
    return score_thresholds(model, questions, [threshold], batch_tokens, on_progress)[0]


@torch.inference_mode()
def score_thresholds(
    model: RoutedLlamaForCausalLM,
    questions: Sequence[EncodedPrompt],
    thresholds: Sequence[Threshold],
    batch_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda questions: None,
    observe: Callable[[Routing], None] = lambda routing: None,
) -> list[Scores]:
    """Score every choice of every question at every θ in packed execution; as scoring at each θ alone, but faster.

    Each distinct prompt is computed once, in one sequence with its choices, which see it and not each other. That is
    exact for routed models too: routing is causal, so a prompt's decisions are the same for every choice. Layers in
    front of the first at which a θ differs from the one before it can't differ either, and aren't computed again: those
    without a router for different θ, and more for θ that differ in late layers only.

    Args:
        model: In evaluation mode.
        questions: Encoded; see :func:`qtale_lightning.data.tokenization.encode_prompt`.
        thresholds: At least one.
        batch_tokens: Tokens (padding included) of a batch; changes no score beyond floating-point noise. None:
            1024 on a CPU, where small batches stay in its caches, else 8192.
        on_progress: Called with the number of questions finished since the last call.
        observe: Called after each forward pass with its routing.
    """
    count = len(thresholds)
    # Scoring runs on one process, also where training ran on many.
    ratios = [
        ExecutionRatio(len(model.model.layers), sync_on_compute=False).to(model.device) for _ in thresholds
    ]
    results = [[np.zeros(len(question.contexts)) for question in questions] for _ in thresholds]
    seconds = [0.0] * count
    batch_tokens = batch_tokens or (1024 if model.device.type == "cpu" else 8192)
    for number, batch in enumerate(_batches(questions, batch_tokens)):
        # Who comes first computes what all share: each in turn, so that their times compare.
        order = [(number + turn) % count for turn in range(count)]
        resume = _resume_at(model.config, [thresholds[i] for i in order])
        prompts = _prompts(questions, batch)
        rows = [
            (prompt, [questions[q].continuations[c] for q, c in pairs]) for prompt, pairs in prompts.items()
        ]
        branches = _Branches(rows, model.device)
        routing = Routing(branch=branches.branch, asked=branches.asked, keep=resume)
        for i, first in zip(order, resume, strict=True):
            started = time.perf_counter()
            routing.threshold, routing.resume = thresholds[i], first
            values = branches.loglikelihoods(model, routing)
            ratios[i].update(routing)
            observe(routing)
            for (q, c), value in zip(itertools.chain(*prompts.values()), values, strict=True):
                results[i][q][c] = value
            seconds[i] += time.perf_counter() - started
        on_progress(len(batch))
    return [
        Scores(found, ratio.compute().tolist(), int(ratio.tokens), time_spent)
        for found, ratio, time_spent in zip(results, ratios, seconds, strict=True)
    ]


def _resume_at(config: RoutedLlamaConfig, thresholds: Sequence[Threshold]) -> list[int]:
    """The layer at which each θ's pass may resume from the one before it: the first where the two differ."""
    values = [config.thresholds(config.threshold if theta is None else theta) for theta in thresholds]
    last = config.num_hidden_layers - 1
    return [0] + [
        next((layer for layer in config.routed_layers if one[layer] != other[layer]), last)
        for one, other in itertools.pairwise(values)
    ]


def _prompts(
    questions: Sequence[EncodedPrompt], batch: Sequence[int]
) -> dict[TokenIds, list[tuple[int, int]]]:
    """Distinct prompts of a batch of questions, and the (question, choice) pairs that continue each."""
    prompts: dict[TokenIds, list[tuple[int, int]]] = {}
    for q in batch:
        for c, context in enumerate(questions[q].contexts):
            prompts.setdefault(context, []).append((q, c))
    return prompts


def _batches(questions: Sequence[EncodedPrompt], batch_tokens: int) -> Iterator[list[int]]:
    """Questions of similar length, longest first, so that memory runs out at once or never."""
    sizes = [
        max(map(len, question.contexts)) + sum(map(len, question.continuations)) for question in questions
    ]
    batch: list[int] = []
    prompts = longest = 0
    for index in sorted(range(len(questions)), key=lambda i: -sizes[i]):
        more = len(set(questions[index].contexts))
        if batch and (prompts + more) * longest > batch_tokens:
            yield batch
            batch, prompts, longest = [], 0, 0
        batch.append(index)
        prompts, longest = prompts + more, max(longest, sizes[index])
    if batch:
        yield batch


def _pad(sequences: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Numbers padded with zeros on the right, ``(B, T)``."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)


class _Branches:
    """Prompts and their continuations as one batch of sequences.

    Attributes:
        branch, asked: See :class:`~qtale_lightning.models.routing.Routing`, ``(B, T)``.
    """

    def __init__(self, rows: Sequence[tuple[TokenIds, Sequence[TokenIds]]], device: torch.device) -> None:
        # A sequence is a prompt and all its continuations but their last tokens, as branches.
        ids: list[list[int]] = []
        branch: list[list[int]] = []
        position: list[list[int]] = []
        where: list[
            tuple[int, int]
        ] = []  # (sequence, place) of the state that predicts a continuation's token,
        target: list[int] = []  # that token,
        owner: list[int] = []  # and the continuation it belongs to
        owners = itertools.count()
        for sequence, (prompt, continuations) in enumerate(rows):
            ids.append(list(prompt))
            branch.append([0] * len(prompt))
            position.append(list(range(len(prompt))))
            for number, continuation in enumerate(continuations, start=1):
                start, inner = len(ids[-1]), len(continuation) - 1
                places = [len(prompt) - 1, *range(start, start + inner)]
                where += [(sequence, place) for place in places]
                target += continuation
                owner += [next(owners)] * len(continuation)
                ids[-1] += continuation[:-1]
                branch[-1] += [number] * inner
                position[-1] += range(len(prompt), len(prompt) + inner)

        lengths = torch.tensor([len(sequence) for sequence in ids], device=device)
        self.ids, self.branch, self.position = (_pad(rows, device) for rows in (ids, branch, position))
        self.mask = (torch.arange(self.ids.shape[1], device=device) < lengths[:, None]).long()
        self.where = tuple(torch.tensor(where, device=device).T)
        self.asked = torch.zeros_like(self.mask, dtype=torch.bool)
        self.asked[self.where] = True
        self.target = torch.tensor(target, device=device)
        self.owner = torch.tensor(owner, device=device)
        self.continuations = next(owners)

    def loglikelihoods(self, model: RoutedLlamaForCausalLM, routing: Routing) -> list[float]:
        """Log-likelihood of each continuation after its prompt, prompt after prompt, in one pass."""
        hidden = model.model(
            self.ids,
            attention_mask=self.mask,
            position_ids=self.position,
            use_cache=False,
            routing=routing,
        ).last_hidden_state
        # The head where a continuation token is predicted, and nowhere else.
        loglikelihoods = -torch.cat(
            [
                nn.functional.cross_entropy(model.lm_head(states).float(), target, reduction="none")
                for states, target in zip(
                    hidden[self.where].split(1024), self.target.split(1024), strict=True
                )
            ]
        )
        totals = torch.zeros(self.continuations, dtype=torch.float64, device=model.device)
        return totals.index_add_(0, self.owner, loglikelihoods.double()).tolist()
