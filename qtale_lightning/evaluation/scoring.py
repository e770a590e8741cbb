"""Log-likelihood scoring of multiple-choice questions."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qtale_lightning.data.tokenization import EncodedPrompt
from qtale_lightning.metrics import ExecutionRatio
from qtale_lightning.models.modeling import RoutedLlamaForCausalLM
from qtale_lightning.models.routing import Routing

TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class Scores:
    """What a model thinks of questions, in their order.

    Attributes:
        loglikelihoods: Per question, the summed log-likelihood in nats of each choice's tokens.
        execution: Share of computed tokens that executed each layer, ``(layers,)``; a prompt that choices share is
            computed, and counted, once.
        tokens: Number of computed tokens.
    """

    loglikelihoods: list[np.ndarray]
    execution: list[float]
    tokens: int


@torch.inference_mode()
def score(
    model: RoutedLlamaForCausalLM,
    questions: Sequence[EncodedPrompt],
    threshold: float | None = None,
    batch_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda questions: None,
) -> Scores:
    """Score every choice of every question in packed execution.

    Each distinct prompt is computed once, in one sequence with its choices, which see it and not each other. That is
    exact for routed models too: routing is causal, so a prompt's decisions are the same for every choice.

    Args:
        model: In evaluation mode.
        questions: Encoded; see :func:`qtale_lightning.data.tokenization.encode_prompt`.
        threshold: θ; None is the model's own.
        batch_tokens: Tokens (padding included) of a batch; changes no score beyond floating-point noise. None:
            512 on a CPU, where small batches stay in its caches, else 8192.
        on_progress: Called with the number of questions finished since the last call.
    """
    # Scoring runs on one process, also where training ran on many.
    ratio = ExecutionRatio(len(model.model.layers), sync_on_compute=False).to(model.device)
    results: list[np.ndarray] = [np.zeros(len(question.contexts)) for question in questions]
    batch_tokens = batch_tokens or (512 if model.device.type == "cpu" else 8192)
    for batch in _batches(questions, batch_tokens):
        # Distinct prompts of the batch, and the (question, choice) pairs that continue each.
        prompts: dict[TokenIds, list[tuple[int, int]]] = {}
        for q in batch:
            for c, context in enumerate(questions[q].contexts):
                prompts.setdefault(context, []).append((q, c))
        rows = [
            (prompt, [questions[q].continuations[c] for q, c in pairs]) for prompt, pairs in prompts.items()
        ]
        values = _continuation_loglikelihoods(model, rows, threshold, ratio)
        for (q, c), value in zip(itertools.chain(*prompts.values()), values, strict=True):
            results[q][c] = value
        on_progress(len(batch))
    return Scores(results, ratio.compute().tolist(), int(ratio.tokens))


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


def _continuation_loglikelihoods(
    model: RoutedLlamaForCausalLM,
    rows: Sequence[tuple[TokenIds, Sequence[TokenIds]]],
    threshold: float | None,
    ratio: ExecutionRatio,
) -> list[float]:
    """Log-likelihood of each continuation after its prompt, prompt after prompt."""
    # [STEP 1] A sequence is a prompt and all its continuations but their last tokens, as branches.
    ids: list[list[int]] = []
    branch: list[list[int]] = []
    position: list[list[int]] = []
    where: list[tuple[int, int]] = []  # (sequence, place) of the state that predicts a continuation's token,
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

    # [STEP 2] One pass.
    device = model.device
    lengths = torch.tensor([len(sequence) for sequence in ids], device=device)
    padded = _pad(ids, device)
    routing = Routing(threshold=threshold, branch=_pad(branch, device))
    hidden = model.model(
        padded,
        attention_mask=(torch.arange(padded.shape[1], device=device) < lengths[:, None]).long(),
        position_ids=_pad(position, device),
        use_cache=False,
        routing=routing,
    ).last_hidden_state
    ratio.update(routing)

    # [STEP 3] The head where a continuation token is predicted, and nowhere else.
    states = hidden[tuple(torch.tensor(where, device=device).T)]
    loglikelihoods = -torch.cat(
        [
            nn.functional.cross_entropy(model.lm_head(s).float(), t, reduction="none")
            for s, t in zip(states.split(1024), torch.tensor(target, device=device).split(1024), strict=True)
        ]
    )
    totals = torch.zeros(next(owners), dtype=torch.float64, device=device)
    return totals.index_add_(0, torch.tensor(owner, device=device), loglikelihoods.double()).tolist()
