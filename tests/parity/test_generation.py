"""Generation with a RoutedCache against masked passes over whole sequences, and against Hugging Face's cache.

Logits are the same sums in another order (tests/tolerance.py). Tokens are compared exactly: logits of a token and the
next best one differ by far more.
"""

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from qtale_lightning import cpu
from qtale_lightning.models import RoutedCache, RoutedForCausalLM, Routing, route
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.int4_cpu import Int4CPU, Int4Strips, kernel_block
from qtale_lightning.quantization.kernels import Dequantize
from qtale_lightning.quantization.linear import QuantizedLinear
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.recipe import round_to_nearest
from tests.llama import llama_config
from tests.parity.conftest import TERMS
from tests.tolerance import close, depth, noise

MakeRouted = Callable[..., RoutedForCausalLM]

pytestmark = pytest.mark.usefixtures("operations")

BATCH, LENGTH, NEW = 4, 13, 6

CUTS = {
    "one call": [0, 13],
    "token by token": list(range(14)),
    "prompt and tokens": [0, 8, *range(9, 14)],
    "several calls": [0, 6, 7, 11, 13],
    "a token first": [0, 1, 5, 6, 12, 13],
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "repetition penalty": {"repetition_penalty": 1.7},
}


def tokens(seed: int = 3) -> Tensor:
    return torch.randint(1, 97, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def padding(side: str | None) -> Tensor:
    """Sequences of 13, 9, 5 and 1 real tokens; of 13 each without a side."""
    lengths, place = torch.tensor([LENGTH, 9, 5, 1])[:, None], torch.arange(LENGTH)
    if side is None:
        return torch.ones(BATCH, LENGTH, dtype=torch.long)
    return (place < lengths if side == "right" else place >= LENGTH - lengths).long()


def random_gates(model: RoutedForCausalLM, share: float) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {i: torch.rand(BATCH, LENGTH, generator=generator) < share for i in model.config.routed_layers}


@torch.no_grad()
def masked(model: RoutedForCausalLM, ids: Tensor, mask: Tensor, **how: Any) -> tuple[Tensor, Routing]:
    """The reference: every token computed, no cache."""
    routing = Routing(execution="masked", **how)
    return model(ids, attention_mask=mask, routing=routing, use_cache=False).logits, routing


@torch.no_grad()
def in_parts(
    model: RoutedForCausalLM, mask: Tensor, cuts: list[int], forced: dict[int, Tensor] | None = None
) -> tuple[Tensor, RoutedCache]:
    """Logits of calls that share a cache."""
    cache, parts = RoutedCache(), []
    for start, end in itertools.pairwise(cuts):
        gates = None if forced is None else {i: gate[:, start:end] for i, gate in forced.items()}
        ids, seen = tokens()[:, start:end], mask[:, :end]
        output = model(ids, attention_mask=seen, past_key_values=cache, routing=Routing(forced=gates))
        parts.append(output.logits)
    return torch.cat(parts, 1), cache


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    defaults = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(11)
    return model.generate(ids, attention_mask=mask, **defaults | options)


# Calls that share a cache


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("cuts", CUTS)
def test_calls_with_a_cache_equal_one_masked_pass(
    routed: RoutedForCausalLM, cuts: str, side: str | None
) -> None:
    mask = padding(side)
    expected, _ = masked(routed, tokens(), mask)
    actual, cache = in_parts(routed, mask, CUTS[cuts])
    close(actual[mask.bool()], expected[mask.bool()], TERMS)
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("cuts", ["token by token", "several calls", "a token first"])
def test_calls_with_a_cache_equal_one_masked_pass_for_random_gates(
    routed: RoutedForCausalLM, cuts: str, share: float, side: str | None
) -> None:
    mask, forced = padding(side), random_gates(routed, share)
    expected, routing = masked(routed, tokens(), mask, forced=forced)
    actual, cache = in_parts(routed, mask, CUTS[cuts], forced)
    close(actual[mask.bool()], expected[mask.bool()], TERMS)
    for layer, gate in routing.gates.items():
        assert sum(cache.layer(layer).lengths) == int(gate.sum())


@torch.no_grad()
def test_a_large_batch_whose_packing_repeats_tokens(routed: RoutedForCausalLM) -> None:
    """More than 16 executing sequences are rounded up to a multiple of 16: the last one's token is computed again."""
    count, length = 40, 6
    ids = torch.randint(1, 97, (count, length), generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(5)
    forced = {i: torch.rand(count, length, generator=generator) < 0.6 for i in routed.config.routed_layers}
    assert any(gate[:, -1].sum() % 16 for gate in forced.values())
    expected, routing = masked(routed, ids, torch.ones_like(ids), forced=forced)
    cache = RoutedCache()
    for start, end in itertools.pairwise([0, 4, 5, 6]):
        gates = {i: gate[:, start:end] for i, gate in forced.items()}
        logits = routed(ids[:, start:end], past_key_values=cache, routing=Routing(forced=gates)).logits
        close(logits, expected[:, start:end], TERMS)
    for layer, gate in routing.gates.items():
        assert cache.layer(layer).lengths == tuple(gate.sum(1).int().tolist())


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_step_equals_a_masked_pass_over_what_it_has_seen(routed: RoutedForCausalLM, side: str) -> None:
    ids, mask = tokens(), padding(side)
    actual, _ = in_parts(routed, mask, CUTS["token by token"])
    for end in range(1, LENGTH + 1):
        real = mask[:, end - 1].bool()
        expected, _ = masked(routed, ids[:, :end], mask[:, :end])
        close(actual[real, end - 1], expected[real, -1], TERMS)


def test_logits_of_the_last_position_alone(routed: RoutedForCausalLM) -> None:
    mask, caches = padding("left"), (RoutedCache(), RoutedCache())
    with torch.no_grad():
        whole = routed(tokens(), attention_mask=mask, past_key_values=caches[0]).logits
        last = routed(tokens(), attention_mask=mask, past_key_values=caches[1], logits_to_keep=1).logits
    close(last, whole[:, -1:], TERMS)
    assert last.shape[1] == 1
    assert [layer.lengths for layer in caches[0].layers] == [layer.lengths for layer in caches[1].layers]


# generate()


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("mode", MODES)
def test_generation_is_the_same_without_a_cache(
    routed: RoutedForCausalLM, mode: str, side: str | None
) -> None:
    cached = generate(routed, tokens(), padding(side), **MODES[mode])
    uncached = generate(routed, tokens(), padding(side), use_cache=False, **MODES[mode])
    assert cached.shape == (BATCH * MODES[mode].get("num_return_sequences", 1), LENGTH + NEW)
    assert torch.equal(cached, uncached)
    assert len(cached[:, LENGTH:].unique()) > 3  # it doesn't repeat one token


def test_greedy_generation_follows_masked_passes(routed: RoutedForCausalLM) -> None:
    sequence, seen = tokens(), padding("left")
    for _ in range(NEW):
        with torch.no_grad():
            following = routed(
                sequence, attention_mask=seen, routing=Routing(execution="masked"), use_cache=False
            ).logits[:, -1].argmax(-1)  # fmt: skip
        sequence = torch.cat([sequence, following[:, None]], 1)
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
    assert torch.equal(generate(routed, tokens(), padding("left")), sequence)


def test_beams_are_reordered_in_the_cache(routed: RoutedForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, mixed = generate(routed, tokens(), num_beams=3), []
    monkeypatch.setattr(RoutedCache, "reorder_cache", lambda _, beams: mixed.append(beams.tolist()))
    assert not torch.equal(generate(routed, tokens(), num_beams=3), expected)
    assert any(beams != sorted(set(beams)) for beams in mixed)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_a_padded_batch_continues_as_each_prompt_alone(routed: RoutedForCausalLM, mode: str) -> None:
    mask = padding("left")
    together = generate(routed, tokens(), mask, **MODES[mode])
    for row in range(BATCH):
        alone = generate(routed, tokens()[row : row + 1, mask[row].bool()], **MODES[mode])
        assert torch.equal(together[row, LENGTH:], alone[0, -NEW:])


def test_finished_sequences_leave_the_others_alone(routed: RoutedForCausalLM) -> None:
    free = generate(routed, tokens(), padding("left"))
    end = int(free[0, LENGTH + 2])  # the first sequence's third token
    ended = generate(routed, tokens(), padding("left"), eos_token_id=end)
    assert ended[0, LENGTH + 2] == end
    assert not ended[0, LENGTH + 3 :].any()
    for row in range(1, BATCH):
        stop = next((i for i in range(LENGTH, LENGTH + NEW) if free[row, i] == end), LENGTH + NEW - 1)
        assert torch.equal(ended[row, : stop + 1], free[row, : stop + 1])


class Collector(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        assert not self.ended
        self.given.append(value.flatten())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("mode", ["greedy", "sampling"])
def test_streamed_tokens_are_the_returned_ones(routed: RoutedForCausalLM, mode: str) -> None:
    streamer = Collector()
    returned = generate(routed, tokens()[:1], streamer=streamer, **MODES[mode])
    assert streamer.ended
    assert [len(part) for part in streamer.given] == [LENGTH] + [1] * NEW
    assert torch.equal(torch.cat(streamer.given), returned[0])
    assert torch.equal(returned, generate(routed, tokens()[:1], **MODES[mode]))


def test_nothing_leaks_from_one_generation_to_the_next(routed: RoutedForCausalLM) -> None:
    first = generate(routed, tokens(), padding("left"), num_beams=2)
    generate(routed, tokens(9)[:2, :5])
    assert torch.equal(generate(routed, tokens(), padding("left"), num_beams=2), first)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", [None, "left"])
def test_generate_takes_a_routing(routed: RoutedForCausalLM, side: str | None, use_cache: bool) -> None:
    mask, routing = padding(side), Routing(threshold=0.9)
    actual = generate(routed, tokens(), mask, routing=routing, use_cache=use_cache)
    assert not torch.equal(actual, generate(routed, tokens(), mask))
    routed.config.threshold = 0.9
    assert torch.equal(actual, generate(routed, tokens(), mask))
    assert routing.tokens.shape == (BATCH, 1 if use_cache else LENGTH + NEW - 1)  # the last step's


def test_a_routing_can_be_used_again(routed: RoutedForCausalLM) -> None:
    for execution in ("packed", "masked"):
        routing = Routing(execution=execution)  # type: ignore[arg-type]
        for side, length in (("left", LENGTH), ("right", LENGTH), (None, 5)):
            ids, mask = tokens()[:, :length], padding(side)[:, :length]
            with torch.no_grad():
                again = routed(ids, attention_mask=mask, routing=routing, use_cache=False).logits
                fresh = routed(
                    ids, attention_mask=mask, routing=Routing(execution=execution), use_cache=False
                ).logits
            assert torch.equal(again, fresh)


def test_a_returned_cache_continues(routed: RoutedForCausalLM) -> None:
    mask = padding("left")
    first = generate(routed, tokens(), mask, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, tokens(8)[:, :4]], 1)
    seen = torch.cat([mask, mask.new_ones(BATCH, NEW + 4)], 1)
    cache = first.past_key_values
    assert isinstance(cache, RoutedCache)
    assert cache.seen == LENGTH + NEW - 1
    assert torch.equal(generate(routed, turn, seen, past_key_values=cache), generate(routed, turn, seen))


def test_a_prompt_in_chunks_and_as_embeddings(routed: RoutedForCausalLM) -> None:
    mask = padding("left")
    expected = generate(routed, tokens(), mask)
    assert torch.equal(generate(routed, tokens(), mask, prefill_chunk_size=5), expected)
    embedded = routed.model.embed_tokens(tokens())
    new = generate(routed, None, mask, inputs_embeds=embedded)  # type: ignore[arg-type]
    assert torch.equal(new, expected[:, LENGTH:])


def test_assisted_generation_is_refused(routed: RoutedForCausalLM) -> None:
    with pytest.raises(NotImplementedError, match="prompt_lookup_num_tokens"):
        generate(routed, tokens()[:1], prompt_lookup_num_tokens=3)


# Memory of keys and values


def dense_memory(dense: LlamaForCausalLM, ids: Tensor, mask: Tensor) -> int:
    """Bytes that Hugging Face's cache holds for the sequences without their padding."""
    held = 0
    for row, real in zip(ids, mask.bool(), strict=True):
        cache = DynamicCache()
        with torch.no_grad():
            dense(row[real][None], past_key_values=cache)
        for layer in cache.layers:
            assert layer.keys is not None
            assert layer.values is not None
            held += sum(kept.numel() * kept.element_size() for kept in (layer.keys, layer.values))
    return held


def check_memory(
    cache: RoutedCache, dense: LlamaForCausalLM, routed: RoutedForCausalLM, ids: Tensor, mask: Tensor
) -> None:
    """Lengths are the masked pass's decisions; memory is the execution ratio times the dense model's."""
    _, routing = masked(routed, ids, mask)
    layers = range(routed.config.num_hidden_layers)
    gates = [routing.gates.get(layer, mask.bool()) for layer in layers]
    assert [cache.layer(i).lengths for i in layers] == [tuple(gate.sum(1).tolist()) for gate in gates]
    ratio = Fraction(int(sum(gate.sum() for gate in gates)), len(gates) * int(mask.sum()))
    assert Fraction(1, 4) < ratio < Fraction(9, 10)
    assert cache.memory() == ratio * dense_memory(dense, ids, mask)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("cuts", ["one call", "several calls", "token by token"])
def test_memory_is_the_execution_ratio_of_the_dense_cache(
    dense: LlamaForCausalLM, routed: RoutedForCausalLM, cuts: str, side: str | None
) -> None:
    mask = padding(side)
    _, cache = in_parts(routed, mask, CUTS[cuts])
    check_memory(cache, dense, routed, tokens(), mask)


@pytest.mark.parametrize("mode", ["greedy", "several samples"])
def test_memory_after_generation(dense: LlamaForCausalLM, routed: RoutedForCausalLM, mode: str) -> None:
    mask = padding("left")
    output = generate(routed, tokens(), mask, return_dict_in_generate=True, **MODES[mode])
    ids = output.sequences[:, :-1]  # the last token was returned, not read
    seen = mask.repeat_interleave(len(ids) // BATCH, 0)
    seen = torch.cat([seen, seen.new_ones(len(ids), NEW - 1)], 1)
    check_memory(output.past_key_values, dense, routed, ids, seen)


def test_a_skipped_layer_keeps_its_keys(routed: RoutedForCausalLM) -> None:
    mask = padding("left")
    with torch.no_grad():
        cache = RoutedCache()
        routed(tokens(), attention_mask=mask, past_key_values=cache)
        for step in range(1, 4):
            before = [(layer.lengths, layer.keys[:, :, : layer.longest].clone()) for layer in cache.layers]
            gates = {1: [0, 0, 0, 0], 2: [1, 0, 0, 1], 3: [1, 1, 1, 1], 4: [0, 0, 1, 0]}
            forced = {i: torch.tensor(gate, dtype=torch.bool)[:, None] for i, gate in gates.items()}
            # The last sequence has one real token, so its next one is reserved: it executes every layer.
            executed = {i: [*gate[:3], 1 if step == 1 else gate[3]] for i, gate in gates.items()}
            seen = torch.cat([mask, mask.new_ones(BATCH, step)], 1)
            routed(
                tokens()[:, :1], attention_mask=seen, past_key_values=cache, routing=Routing(forced=forced)
            )
            for i, (layer, (lengths, keys)) in enumerate(zip(cache.layers, before, strict=True)):
                added = executed.get(i, [1] * BATCH)
                assert layer.lengths == tuple(a + b for a, b in zip(lengths, added, strict=True))
                for row, length in enumerate(lengths):
                    assert torch.equal(layer.keys[row, :, :length], keys[row, :, :length])


# Quantized to four bits

QUANTIZED = {  # inputs in groups of 32, outputs in blocks of 64: what the int4 kernels take
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "initializer_range": 0.2,
    "router_width": 16, "start_layer": 1,
}  # fmt: skip


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def quantized(request: pytest.FixtureRequest) -> RoutedForCausalLM:
    config = llama_config(**QUANTIZED)
    torch.manual_seed(0)
    model = route(LlamaForCausalLM(config), config)
    for layer in model.model.layers:
        if layer.router is not None:
            torch.nn.init.normal_(layer.router.out.weight, 0.0, 2.0)
            torch.nn.init.zeros_(layer.router.out.bias)
    names = dict.fromkeys(linear_shapes(model), 4)
    quantize_model(model, round_to_nearest(names, 32))
    return model.eval().to(request.param)


def tolerance(expected: Tensor) -> dict[str, float]:
    """In bfloat16 a dozen roundings of 2⁻⁸ stand between the two, each of values of the logits' own relative size."""
    low = 12 * 2**-8 * float(expected.abs().max())
    exact = noise(expected, depth(llama_config(**QUANTIZED)))
    return {"rtol": 0.0, "atol": exact if expected.dtype == torch.float32 else low}


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("cuts", ["one call", "token by token", "several calls"])
def test_quantized_packed_execution_equals_masked(
    quantized: RoutedForCausalLM, cuts: str, side: str | None
) -> None:
    # Decisions are given: one at the threshold may fall otherwise by a rounding in bfloat16.
    mask, forced = padding(side), random_gates(quantized, 0.5)
    expected, _ = masked(quantized, tokens(), mask, forced=forced)
    actual, cache = in_parts(quantized, mask, CUTS[cuts], forced)
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **tolerance(expected))
    linears = [module for module in quantized.modules() if isinstance(module, QuantizedLinear)]
    assert len(linears) == 7 * QUANTIZED["num_hidden_layers"]
    expected_kernel = Int4Strips if cpu.available() else Int4CPU if kernel_block() is not None else Dequantize
    assert {type(linear.kernel) for linear in linears} == {expected_kernel}
    assert cache.layer(0).keys.dtype == expected.dtype


@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams"])
def test_quantized_generation_is_the_same_without_a_cache(quantized: RoutedForCausalLM, mode: str) -> None:
    mask, options = padding("left"), MODES[mode]
    cached = generate(quantized, tokens(), mask, return_dict_in_generate=True, **options)
    seen = torch.cat([mask, mask.new_ones(BATCH, NEW - 1)], 1)
    assert cached.sequences.shape == (BATCH, LENGTH + NEW)
    if quantized.dtype == torch.float32:
        uncached = generate(quantized, tokens(), mask, use_cache=False, **options)
        assert torch.equal(cached.sequences, uncached)
    if mode != "beams":  # beams that were dropped have left the cache
        _, routing = masked(quantized, cached.sequences[:, :-1], seen)
        executed = int(routing.executed(QUANTIZED["num_hidden_layers"]).sum())
        kept = sum(sum(layer.lengths) for layer in cached.past_key_values.layers)
        # bfloat16: a decision at the threshold may fall otherwise.
        assert abs(kept - executed) <= (0 if quantized.dtype == torch.float32 else 0.05 * executed)
