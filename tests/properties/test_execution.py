"""Masked and packed execution are one, whatever the batch, its padding and the decisions."""

import functools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qtale_lightning.models import RoutedCache, RoutedForCausalLM, Routing, route
from tests.llama import llama_config, mix_decisions
from tests.tolerance import close, depth

ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
    "router_width": 16,
}


@functools.cache
def model(
    start_layer: int, reserved_tokens: int, keep_kv: bool, stand_in_rank: int, gates: str
) -> RoutedForCausalLM:
    options: dict[str, Any] = {"keep_kv": keep_kv, "stand_in_rank": stand_in_rank, "gates": gates}
    options |= {"start_layer": start_layer, "reserved_tokens": reserved_tokens}
    config = llama_config(**ARCHITECTURE, **options)
    torch.manual_seed(0)
    routed = route(LlamaForCausalLM(config), config)
    mix_decisions(routed)
    for layer in routed.model.layers:
        if layer.stand_in is not None:
            nn.init.normal_(layer.stand_in.up.weight, 0.0, 0.5)
    return routed


@st.composite
def batches(draw: st.DrawFn) -> tuple[RoutedForCausalLM, Tensor, Tensor, dict[int, Tensor]]:
    """A model, token ids `(B, T)`, a mask of sequences padded on either side each, and a decision for every token."""
    tools = draw(
        st.one_of(
            st.tuples(st.booleans(), st.sampled_from([0, 4]), st.just("layer")),
            st.just((False, 0, "sublayer")),
        )
    )
    routed = model(draw(st.integers(0, 3)), draw(st.integers(1, 4)), *tools)
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    longest = max(lengths) + draw(st.integers(0, 2))  # no sequence may be whole
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    share = draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
    ids = torch.randint(61, (len(lengths), longest), generator=generator)
    left = draw(st.booleans())
    place, length = torch.arange(longest), torch.tensor(lengths)[:, None]
    mask = (place >= longest - length if left else place < length).long()
    gates = {i: torch.rand(ids.shape, generator=generator) < share for i in routed.config.routed_units}
    return routed, ids, mask, gates


@torch.no_grad()
def logits(routed: RoutedForCausalLM, ids: Tensor, mask: Tensor, routing: Routing) -> Tensor:
    return routed(ids, attention_mask=mask, routing=routing, use_cache=False).logits[mask.bool()]


@given(batches())
def test_masked_and_packed_execution_agree(
    batch: tuple[RoutedForCausalLM, Tensor, Tensor, dict[int, Tensor]],
) -> None:
    routed, ids, mask, gates = batch
    masked = logits(routed, ids, mask, Routing(execution="masked", forced=gates))
    packed = logits(routed, ids, mask, Routing(execution="packed", forced=gates))
    close(packed, masked, depth(routed.config))


@settings(max_examples=40)
@given(batches(), st.lists(st.integers(0, 14), max_size=4))
@torch.no_grad()
def test_calls_that_share_a_cache_are_one_call(
    batch: tuple[RoutedForCausalLM, Tensor, Tensor, dict[int, Tensor]], cuts: list[int]
) -> None:
    routed, ids, mask, gates = batch
    length = ids.shape[1]
    ends = [*sorted({cut for cut in cuts if 0 < cut < length}), length]
    whole = logits(routed, ids, mask, Routing(forced=gates))
    cache, parts, start = RoutedCache(), [], 0
    for end in ends:
        forced = {i: gate[:, start:end] for i, gate in gates.items()}
        called = routed(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            past_key_values=cache,
            routing=Routing(forced=forced),
        )
        parts.append(called.logits)
        start = end
    close(torch.cat(parts, 1)[mask.bool()], whole, depth(routed.config))
    kept = sum(sum(cache.layer(i).lengths) for i in range(routed.config.num_hidden_layers))
    routing, layers = Routing(forced=gates), routed.config.num_hidden_layers
    logits(routed, ids, mask, routing)
    every, units = layers * int(mask.sum()), len(routed.config.unit_shares)
    attended = routing.executed(layers * units)[::units]  # of a layer's units the first leaves keys
    assert kept == (every if routed.config.keep_kv else int(attended.sum()))
