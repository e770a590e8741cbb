"""Hugging Face's `generate()` by `graph`, where that decodes what is asked for.

Its own loop can't host a graph: after every token it asks the device, on the host, whether all sequences have ended. So
the loop is replaced, and nothing else: prompts, warpers and criteria are those that `generate()` has prepared.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qtale_lightning import cuda
from qtale_lightning.models import graph
from qtale_lightning.models.cache import RoutedCache
from qtale_lightning.models.decoding import MOST_SEQUENCES
from qtale_lightning.models.routing import Routing
from qtale_lightning.routing import method_of

LEAST_TOKENS = 16
"""New ones, from which a graph is worth its capture."""

# They change scores by themselves alone, on the device.
_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


def sample(
    model: Any,
    ids: Tensor,
    warpers: Any,
    criteria: Any,
    settings: Any,
    streamer: Any,
    options: dict[str, Any],
) -> Tensor | None:
    """Tokens ``(B, T + new)`` after prompts ``ids (B, T)``; None where Hugging Face's loop has to do it.

    A `Routing` that is given keeps the prompt's records, and those of the last token that was computed.

    Args:
        model: A `RoutedForCausalLM`.
        ids: The prompts.
        warpers: Logits processors.
        criteria: Of stopping.
        settings: The generation's configuration.
        streamer: Of tokens, or None.
        options: What the model is called with.
    """
    new = _new_tokens(model, ids, warpers, criteria, settings, streamer, options)
    if new is None:
        return None
    choose, how = graph.greedy, ()
    if settings.do_sample:
        choose, how = graph.Sampled(warpers), tuple((type(one), str(vars(one))) for one in warpers)  # type: ignore[assignment]
    decoder = graph.decoder_of(model, len(ids), ids.shape[1] + new, choose, how)
    if decoder is None:
        return None
    routing = options["routing"] = options.get("routing") or Routing()
    mask = options.get("attention_mask")
    scores = model._prefill(ids, settings, options).logits[:, -1]
    cache = options["past_key_values"]
    places = ids.new_full((len(ids),), ids.shape[1]) if mask is None else mask.long().sum(1)
    ends = next((one.eos_token_id for one in criteria if isinstance(one, EosTokenCriteria)), None)
    pad = settings._pad_token_tensor
    decoder.begin(cache, places, scores, routing.thresholds, ends, 0 if pad is None else int(pad))
    cache.reset()  # the decoder has its own
    found = decoder.run(new, watch=ends is not None)
    decoder.record(routing)
    return torch.cat([ids, found], 1)


def _new_tokens(
    model: Any,
    ids: Tensor,
    warpers: Any,
    criteria: Any,
    settings: Any,
    streamer: Any,
    options: dict[str, Any],
) -> int | None:
    """How many are asked for; None where a graph can't give what is asked for."""
    cache, routing = options.get("past_key_values"), options.get("routing")
    lengths = [one.max_length for one in criteria if isinstance(one, MaxLengthCriteria)]
    ends = [one.eos_token_id for one in criteria if isinstance(one, EosTokenCriteria)]
    if (
        not cuda.available(ids.device)
        or model.training
        or streamer is not None
        or settings.return_dict_in_generate
        or any(options.get(name) is not None for name in ("inputs_embeds", "position_ids"))
        or not isinstance(cache, RoutedCache)
        or not cache.of_one_call
        or len(ids) > MOST_SEQUENCES
        or len(lengths) != 1
        or len(lengths) + len(ends) != len(criteria)
        or any(one.numel() > graph.MOST_ENDS for one in ends)
        or any(type(one) not in _WARPERS for one in warpers)
        or not (routing is None or _is_plain(routing))
    ):
        return None
    new = lengths[0] - ids.shape[1]
    config, windows = model.config, [layer.window for layer in model.model.layers if layer.window is not None]
    decides = bool(config.routed_layers)
    routed = [layer.layer_idx for layer in model.model.layers if layer.router is not None]
    if decides and not (method_of(config.method).compares and routed == list(config.routed_layers)):
        return None
    return new if new >= LEAST_TOKENS and all(lengths[0] <= window for window in windows) else None


def _is_plain(routing: Routing) -> bool:
    """Whether nothing but decisions by θ is asked of a call."""
    plain = routing.execution in (None, "packed") and not routing.sample and not routing.keep
    return plain and not routing.resume and routing.branch is None and not routing.forced
