"""The next token of each sequence by one call for all layers and the head, `cpu/decoder.h`.

The layers are those of `routed_layer` and `fused`; here is only said when C++ computes the same,
and what it needs of them.
"""

from collections.abc import Mapping
from operator import ge, is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from qtale_lightning import cpu
from qtale_lightning.models.angles import Angles
from qtale_lightning.models.cache import RoutedCache
from qtale_lightning.models.packing import Packing
from qtale_lightning.models.parts import fits, parts_of
from qtale_lightning.models.routing import OfUnits, Routing
from qtale_lightning.watch import Watch

MOST_SEQUENCES = 16
"""Of a step: with more, products of many tokens are faster one by one."""


def next_token(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    routing: Routing,
    cache: RoutedCache,
    options: Mapping[str, Any],
) -> Tensor | None:
    """Logits ``(B, 1, V)``; None where the model's own forward has to compute them.

    Decisions are recorded, and the cache filled, as that would do it.

    Args:
        model: A `RoutedForCausalLM`.
        input_ids: ``(B, 1)``.
        attention_mask: ``(B, seen + 1)``, or None.
        routing: As the caller gave it.
        cache: Of all tokens before.
        options: All others that the call was given.

    Raises:
        ValueError: The mask doesn't fit.
    """
    stack, layers = model.model, cache.layers
    if (
        input_ids is None
        or len(layers) != len(stack.layers)
        or not all(layer.is_initialized for layer in layers)
    ):
        return None
    stack.complete(routing)
    if not _is_plain(model, input_ids, routing, options):
        return None
    decoder = _decoder_of(model, cache)
    if decoder is None:
        return None
    stack.locate(routing, attention_mask, (len(input_ids), 1), cache.seen, input_ids.device)
    if not decoder.reaches(routing):
        return None
    routing.ids = input_ids
    place = options.get("position_ids")
    places = [cache.seen] if place is None else place.flatten().tolist()
    output = decoder.step(input_ids, decoder.angles.at(places), routing, cache)
    cache.seen += 1
    return output if decoder.has_head else model.lm_head(output)


_KNOWN = ("past_key_values", "position_ids", "use_cache", "logits_to_keep", "return_dict")
"""Options that are looked at elsewhere, or that a token's logits are the same with, whatever they are."""


def _is_plain(model: Any, input_ids: Tensor, routing: Routing, options: Mapping[str, Any]) -> bool:
    """Whether a call is one of decoding, of which nothing is asked but logits and θ's decisions."""
    config = model.config
    return (
        len(input_ids) <= MOST_SEQUENCES
        and routing.execution == "packed"
        and not (routing.sample or model.training)
        and not routing.keep
        and not routing.resume
        and routing.branch is None
        and (not routing.thresholds or (routing.method.compares and routing.perturber is None))
        and not any(
            value is not None and value is not False for name, value in options.items() if name not in _KNOWN
        )
        and options.get("return_dict", config.return_dict)
        and not (config.output_hidden_states or config.output_attentions)
        and input_ids.is_cpu
    )


class _Bound(NamedTuple):
    """A cache's buffers as a decoder takes them, which doesn't keep them; and their capacities, by sequence."""

    decoder: "ref[_Decoder]"
    tensors: "list[ref[Tensor]]"
    address: int  # of the first: all move together, where they do
    buffers: Any
    capacities: list[int]

    def holds(self, tensors: list[Tensor]) -> bool:
        """Whether these are the buffers."""
        same = all(map(is_, (kept() for kept in self.tensors), tensors))
        return same and tensors[0].data_ptr() == self.address


class _Decoder:
    """A model's decoder layers, final norm and, where it can, head in C++, for tokens of one dtype."""

    def __init__(self, model: Any, stack: Any, has_head: bool) -> None:
        layers = model.model.layers
        self.stack, self.has_head = stack, has_head
        self.angles = Angles(model.model.rotary_emb, model.model.embed_tokens.weight.detach())
        self.routed = [layer.layer_idx for layer in layers if layer.router is not None]
        self.windows = {layer.layer_idx: layer.window for layer in layers if layer.window is not None}

    def reaches(self, routing: Routing) -> bool:
        """Whether the layers that are decided about are those with routers, and every token sees all before it."""
        return list(routing.thresholds) == self.routed and all(
            routing.length <= window for window in self.windows.values()
        )

    def step(
        self, ids: Tensor, rotary: tuple[Tensor, Tensor], routing: Routing, cache: RoutedCache
    ) -> Tensor:
        """Logits ``(B, 1, V)``, or without a head the normed states ``(B, 1, D)``, of tokens ``(B, 1)``."""
        layers = cache.layers
        kept = [count for layer in layers for count in layer.lengths]
        bound = self._bound(cache, kept)
        output, logits, gates = self.stack.step(
            ids.long().contiguous(),
            *(angles.contiguous() for angles in rotary),
            routing.tokens.contiguous(),
            routing.free.contiguous(),
            routing.keep_kv,
            list(routing.thresholds.values()),
            self._forced(routing),
            bound.buffers,
            kept,
        )
        gates = gates.unsqueeze(-1)
        present = routing.tokens.expand_as(gates) if routing.keep_kv else gates  # leave keys and values
        new = present.flatten().tolist()
        for index in self.windows:
            if present[index].any():
                layers[index].remember(routing.places, Packing.of(present[index]))
        lengths, batch = [*map(int.__add__, kept, new)], len(ids)
        for first, layer in zip(range(0, len(lengths), batch), layers, strict=True):
            layer.lengths = tuple(lengths[first : first + batch])
        routing.logits = OfUnits(self.routed, logits.unsqueeze(2))
        routing.gates = OfUnits(self.routed, gates if len(self.routed) == len(gates) else gates[self.routed])
        return output

    def _bound(self, cache: RoutedCache, kept: list[int]) -> _Bound:
        """A cache's buffers, with room for a token more than they keep."""
        known, tensors = _bound.get(cache), cache.buffers()
        if (
            known is None
            or known.decoder() is not self
            or any(map(ge, kept, known.capacities))
            or not known.holds(tensors)
        ):
            del tensors
            for layer in cache.layers:
                layer.reserve_next()
            tensors = cache.buffers()
            keys, values = tensors[::2], tensors[1::2]
            capacities = [part.shape[2] for part in keys for _ in part]
            known = _Bound(
                ref(self), [*map(ref, tensors)], tensors[0].data_ptr(), cpu.buffers(keys, values), capacities
            )
            _bound[cache] = known
        return known

    def _forced(self, routing: Routing) -> Tensor | None:
        """Decisions that replace the routers', int8 ``(R, B)``, -1 where there are none."""
        forced = routing.forced
        if not forced or not self.routed:
            return None
        if isinstance(forced, OfUnits) and forced.units == self.routed:
            return forced.rows.to(torch.int8).expand(-1, *routing.tokens.shape).contiguous()
        unknown = torch.full_like(routing.tokens, -1, dtype=torch.int8)
        rows = [forced.get(layer, unknown).expand_as(unknown) for layer in self.routed]
        return torch.cat(rows).to(torch.int8)


_decoders: "WeakKeyDictionary[Any, tuple[torch.dtype, Watch, _Decoder | None]]" = WeakKeyDictionary()
_bound: "WeakKeyDictionary[RoutedCache, _Bound]" = WeakKeyDictionary()


def forget(model: Any) -> None:
    """Let go of what was made of a `RoutedForCausalLM`, whose weights are about to move."""
    _decoders.pop(model, None)


def _decoder_of(model: Any, cache: RoutedCache) -> _Decoder | None:
    """A model in C++, made anew where something about it has changed; None: it can't run there.

    All of the model is looked at for a cache's first token, and where a change was noted since; see `Watch`.
    """
    embeddings, known = model.model.embed_tokens.weight, _decoders.get(model)
    if not cpu.ready(embeddings):
        return None
    if known is not None and known[0] == embeddings.dtype:
        _, watch, decoder = known
        bound = _bound.get(cache)
        seen = bound is not None and decoder is not None and bound.decoder() is decoder
        if (seen and watch.undisturbed()) or watch.unchanged():
            return decoder
        if watch.hooked() and watch.same():
            return None
    del known
    forget(model)
    decoder = _made(model, embeddings.dtype)
    watch = Watch([*model.modules()][1:], [model._modules])  # whose own hooks run around this call
    _decoders[model] = embeddings.dtype, watch, decoder
    return decoder if watch.unchanged() else None


def _made(model: Any, dtype: torch.dtype) -> _Decoder | None:
    """A model in C++; None where its layers aren't known there, or are of shapes or dtypes that it doesn't take."""
    stack, config, lanes = model.model, model.config, cpu.LANES
    layers, parts = stack.layers, parts_of(stack, dtype)
    if parts is None or getattr(config, "final_logit_softcapping", None) is not None:
        return None
    width, groups = layers[0].self_attn.head_dim, config.num_key_value_heads
    sizes = [config.hidden_size, config.intermediate_size]
    if config.routed_layers:
        sizes.append(config.router_width)
    if width % (2 * lanes) or width > cpu.WIDEST_HEAD or any(size % lanes for size in sizes):
        return None
    scaling, eps = layers[0].self_attn.scaling, stack.norm.variance_epsilon
    head: Any = model.lm_head
    operands = head.operands(dtype) if hasattr(head, "operands") and head.in_features == sizes[0] else None
    embeddings = stack.embed_tokens.weight  # where the head's, which may be the same, are now
    made = cpu.decoder(config.num_attention_heads, groups, width, scaling, eps, embeddings, stack.norm.weight)
    for part in parts:
        made.add(*part)
    has_head = operands is not None and (len(operands) > 1 or head.out_features % lanes == 0)
    has_head = has_head and (head.bias is None or fits(head.bias, dtype))
    if has_head:
        made.end(operands, head.bias, getattr(head, "vocabulary", head.out_features))
    return _Decoder(model, made, has_head)
