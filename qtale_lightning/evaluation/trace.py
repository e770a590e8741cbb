"""What a model decides about texts, token by token and layer by layer, and what another model decides otherwise.

Traces of several precisions of a model, at one θ on the same texts, are kept in one JSON file (`document`):

    {"schema": 1, "title", "theta", "layers", "start_layer": first layer with a router, "reserved_tokens",
     "shares": of a layer's n units, what routers decide about, [1] or of attention and MLP (`unit_shares`),
     "precisions": [{"bits", "engine", …}],     with the row of `changes` in results.json, where it was measured
     "texts": [{"name": task or "text", "tokens": [text of each, T], "answer": index of its first token,
                "traces": [one a precision: {
                    "executed":    T strings of R characters, a "1" for each executed routed unit,
                    "probability": T lists of R numbers, p(execute) in thousandths,
                    "nll":         T numbers, of each token after those before, in nats; null for the first}]}]}

R = (layers − start_layer) · n. Layers before start_layer have no router and execute always; so do the first
reserved_tokens tokens of a text in every layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qtale_lightning.batching import by_length
from qtale_lightning.evaluation.accuracy import standard_error
from qtale_lightning.models.config import RoutedConfig
from qtale_lightning.models.modeling import RoutedForCausalLM
from qtale_lightning.models.routing import Routing, by_layer
from qtale_lightning.paths import path_codes, path_statistics
from qtale_lightning.routing.router import execute_probability

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Text:
    """A text to trace.

    Attributes:
        name: What it is: a task, or the user's own text.
        ids: Its tokens, T of them.
        answer: Where the answer begins; T where there is none.
    """

    name: str
    ids: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Trace:
    """A model's decisions about the T tokens of a text in its R routed units, on the CPU.

    Attributes:
        probability: p(execute), float32 ``(T, R)``.
        executed: Decisions, bool ``(T, R)``; reserved tokens execute every unit.
        free: Tokens that routers decide about, bool ``(T,)``.
        nll: Of each token after those before it, in nats, ``(T,)``; NaN for the first.
    """

    probability: Tensor
    executed: Tensor
    free: Tensor
    nll: Tensor


@torch.inference_mode()
def trace(
    model: RoutedForCausalLM,
    texts: Sequence[Text],
    threshold: float | None = None,
    forced: Sequence[Trace] | None = None,
) -> list[Trace]:
    """Run texts through a model and record its decisions.

    Args:
        model: In evaluation mode, with routers: of a method that has θ.
        texts: In any order; traces come in the same.
        threshold: θ; None is the model's own.
        forced: Traces of the same texts whose decisions are taken instead of the model's own; ``probability`` stays
            the model's own.
    """
    traces: dict[int, Trace] = {}
    for batch in by_length([len(text.ids) for text in texts], BATCH_TOKENS):
        rows = [torch.tensor(texts[i].ids) for i in batch]
        ids, mask = (
            _pad(tensors).to(model.device) for tensors in (rows, [torch.ones_like(row) for row in rows])
        )
        routing = Routing(threshold=threshold)
        if forced is not None:
            decisions = _pad([forced[i].executed for i in batch])
            units = model.config.routed_units
            routing.forced = dict(zip(units, decisions.to(model.device).unbind(-1), strict=True))
        hidden = model.model(ids, attention_mask=mask, use_cache=False, routing=routing).last_hidden_state
        nll = _nll(model, hidden[:, :-1], ids[:, 1:])
        probability = execute_probability(routing.stacked_logits()).permute(1, 2, 0).cpu()
        executed = routing.stacked_gates().permute(1, 2, 0).cpu() > 0.5
        for row, i in enumerate(batch):
            end = len(texts[i].ids)
            first = torch.full((1,), torch.nan)
            traces[i] = Trace(
                probability[row, :end],
                executed[row, :end],
                routing.free[row, :end].cpu(),
                torch.cat([first, nll[row, : end - 1].cpu()]),
            )
    return [traces[i] for i in range(len(texts))]


def _pad(rows: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _nll(model: RoutedForCausalLM, hidden: Tensor, targets: Tensor) -> Tensor:
    """Of each target after its state, ``(B, T)`` in nats from states ``(B, T, D)``; logits of 512 tokens at a time."""
    pairs = zip(hidden.flatten(0, 1).split(512), targets.flatten().split(512), strict=True)
    values = [
        nn.functional.cross_entropy(model.lm_head(states).float(), ids, reduction="none")
        for states, ids in pairs
    ]
    return torch.cat(values).view(targets.shape)


def changed_decisions(reference: Sequence[Trace], traces: Sequence[Trace]) -> list[Tensor]:
    """Where a model decides otherwise than the reference about the same texts, bool ``(T, R)`` each."""
    return [one.executed != other.executed for one, other in zip(reference, traces, strict=True)]


def measure_changes(
    config: RoutedConfig,
    texts: Sequence[Text],
    reference: Sequence[Trace],
    own: Sequence[Trace],
    forced: Sequence[Trace],
) -> dict[str, Any]:
    """The measured part of a row of `changes` in results.json (see `qtale_lightning.results.routing.Changes`).

    Args:
        config: The model's.
        texts: Each with an answer.
        reference: What the 16-bit model decides about them.
        own: What the model decides at the same θ.
        forced: The model's traces with the reference's decisions.
    """
    free = torch.cat([trace.free for trace in own])
    executed = torch.cat([trace.executed for trace in own])
    changed = torch.cat(changed_decisions(reference, own))[free].double()
    probability = torch.cat([trace.probability for trace in own])[free].double()
    nll, same = (
        np.array([float(trace.nll[text.answer :].mean()) for text, trace in zip(texts, traces, strict=True)])
        for traces in (own, forced)
    )
    unrouted, layers, shares = config.start_layer, config.num_hidden_layers, config.unit_shares
    return {
        "examples": len(texts),
        "tokens": int(free.sum()),
        "execution_ratio": float((unrouted + by_layer(executed.double().mean(0), shares).sum()) / layers),
        "decisions_changed": float(changed.mean()),
        "paths_changed": float(changed.amax(1).mean()),
        "changed_per_layer": [None] * unrouted
        + changed.mean(0).unflatten(0, (-1, len(shares))).mean(1).tolist(),
        "flip_ratio": float(torch.minimum(probability, 1 - probability).mean()),
        "paths": path_statistics(path_codes(executed[free].T), len(config.routed_units)),
        "nll": float(nll.mean()),
        "nll_same_decisions": float(same.mean()),
        "nll_difference_stderr": standard_error(nll - same),
    }


def document(
    title: str,
    config: RoutedConfig,
    theta: float,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    precisions: Sequence[tuple[Mapping[str, Any], Sequence[Trace]]],
) -> dict[str, Any]:
    """Traces as the JSON file holds them (see above).

    Args:
        title: The run's.
        config: The model's.
        theta: Of all traces.
        tokenizer: The model's.
        texts: What was traced.
        precisions: Each with what is known of it, and its traces of the texts.
    """
    return {
        "schema": 1,
        "title": title,
        "theta": theta,
        "layers": config.num_hidden_layers,
        "start_layer": config.start_layer,
        "reserved_tokens": config.reserved_tokens,
        "shares": list(config.unit_shares),
        "precisions": [dict(known) for known, _ in precisions],
        "texts": [
            {
                "name": text.name,
                "tokens": token_pieces(tokenizer, text.ids),
                "answer": text.answer,
                "traces": [_as_json(traces[i]) for _, traces in precisions],
            }
            for i, text in enumerate(texts)
        ],
    }


def _as_json(trace: Trace) -> dict[str, Any]:
    return {
        "executed": [
            "".join("01"[decision] for decision in token) for token in trace.executed.int().tolist()
        ],
        "probability": (trace.probability * 1000).round().int().tolist(),
        "nll": [None, *(round(value, 3) for value in trace.nll[1:].tolist())],
    }


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; together they are the text.

    A character of several tokens belongs to the last of them, the others are empty.
    """
    pieces, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            pieces.append("")
        else:
            pieces.append(text[len(shown) :])
            shown = text
    return pieces
