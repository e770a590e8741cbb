"""Log-likelihood scoring of multiple-choice questions, with lm-evaluation-harness's ``acc`` and ``acc_norm``."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qtale_lightning.data.tokenization import EncodedPrompt
from qtale_lightning.metrics import ExecutionRatio
from qtale_lightning.models.cache import RoutedCache
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

    Each distinct prompt is computed once; its choices continue from its cache. That is exact for routed models too:
    routing is causal, so a prompt's decisions are the same for every choice.

    Args:
        model: In evaluation mode.
        questions: Encoded; see :func:`qtale_lightning.data.tokenization.encode_prompt`.
        threshold: θ; None is the model's own.
        batch_tokens: Prompt tokens (padding included) of a batch; changes no score beyond floating-point noise. None:
            512 on a CPU, where small batches stay in its caches, else 8192.
        on_progress: Called with the number of questions finished since the last call.
    """
    # Scoring runs on one process, also where training ran on many.
    ratio = ExecutionRatio(len(model.model.layers), sync_on_compute=False).to(model.device)
    results: list[np.ndarray] = [np.zeros(len(question.contexts)) for question in questions]
    batch_tokens = batch_tokens or (512 if model.device.type == "cpu" else 8192)
    for batch in _batches(questions, batch_tokens):
        # Distinct prompts of the batch, and the prompt that each (question, choice) continues.
        prompts: dict[TokenIds, int] = {}
        pairs = [(q, c) for q in batch for c in range(len(questions[q].contexts))]
        rows = [prompts.setdefault(questions[q].contexts[c], len(prompts)) for q, c in pairs]
        continuations = [questions[q].continuations[c] for q, c in pairs]
        values = _continuation_loglikelihoods(model, list(prompts), rows, continuations, threshold, ratio)
        for (q, c), value in zip(pairs, values, strict=True):
            results[q][c] = value
        on_progress(len(batch))
    return Scores(results, ratio.compute().tolist(), int(ratio.tokens))


def _batches(questions: Sequence[EncodedPrompt], batch_tokens: int) -> Iterator[list[int]]:
    """Questions of similar length, longest first, so that memory runs out at once or never."""
    sizes = [max(map(len, question.contexts)) for question in questions]
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


def _pad(sequences: Sequence[TokenIds], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask, ``(B, T)``."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(s, dtype=torch.long) for s in sequences], batch_first=True)
    lengths = torch.tensor([len(s) for s in sequences])
    return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)


def _continuation_loglikelihoods(
    model: RoutedLlamaForCausalLM,
    prompts: Sequence[TokenIds],
    rows: Sequence[int],
    continuations: Sequence[TokenIds],
    threshold: float | None,
    ratio: ExecutionRatio,
) -> list[float]:
    """Log-likelihood of each continuation after its prompt ``prompts[rows[i]]``."""
    device = model.device
    # [STEP 1] Every prompt once; the state behind its last token predicts each continuation's first token.
    ids, mask = _pad(prompts, device)
    cache, routing = RoutedCache(), Routing(threshold=threshold)
    hidden = model.model(ids, attention_mask=mask, past_key_values=cache, routing=routing).last_hidden_state
    ratio.update(routing)
    lengths = mask.sum(1)
    row = torch.tensor(rows, device=device)
    states = [hidden[torch.arange(len(prompts), device=device), lengths - 1][row]]
    targets = [torch.tensor([c[0] for c in continuations], device=device)]
    owners = [torch.arange(len(continuations), device=device)]

    # [STEP 2] The rest of each continuation, from its prompt's cache.
    longer = [i for i, c in enumerate(continuations) if len(c) > 1]
    if longer:
        row = row[longer]
        inputs, inner = _pad([continuations[i][:-1] for i in longer], device)
        cache.select(row)
        routing = Routing(threshold=threshold)
        hidden = model.model(
            inputs,
            attention_mask=torch.cat([mask[row], inner], 1),
            position_ids=lengths[row, None] + torch.arange(inputs.shape[1], device=device),
            past_key_values=cache,
            routing=routing,
        ).last_hidden_state
        ratio.update(routing)
        followers, _ = _pad([continuations[i][1:] for i in longer], device)
        states.append(hidden[inner.bool()])
        targets.append(followers[inner.bool()])
        owners.append(torch.tensor(longer, device=device).repeat_interleave(inner.sum(1)))

    # [STEP 3] The head where a continuation token is predicted, and nowhere else.
    loglikelihoods = -torch.cat(
        [
            nn.functional.cross_entropy(model.lm_head(s).float(), t, reduction="none")
            for s, t in zip(torch.cat(states).split(1024), torch.cat(targets).split(1024), strict=True)
        ]
    )
    totals = torch.zeros(len(continuations), dtype=torch.float64, device=device)
    return totals.index_add_(0, torch.cat(owners), loglikelihoods.double()).tolist()


def task_accuracy(
    questions: Sequence[EncodedPrompt], scores: Sequence[np.ndarray], metric: str
) -> dict[str, object]:
    """One task's row of results: value and standard error of its metric, and the gold answers' nll in nats a token.

    ``acc`` takes the choice of highest log-likelihood, ``acc_norm`` that of the highest per character
    (lm-evaluation-harness); the standard error is binomial.
    """
    labels = np.array([question.label for question in questions])
    hits = {
        "acc": np.array([int(s.argmax()) for s in scores]) == labels,
        "acc_norm": np.array(
            [int((s / q.choice_lengths).argmax()) for q, s in zip(questions, scores, strict=True)]
        )
        == labels,
    }
    nll = np.array(
        [-s[q.label] / len(q.continuations[q.label]) for q, s in zip(questions, scores, strict=True)]
    )
    return {
        "value": float(hits[metric].mean()),
        "stderr": standard_error(hits[metric].astype(float)),
        "metric": metric,
        "nll": float(nll.mean()),
        "nll_stderr": standard_error(nll),
        "acc": float(hits["acc"].mean()),
        "acc_norm": float(hits["acc_norm"].mean()),
        "examples": len(questions),
    }


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of independent values; 0 for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
