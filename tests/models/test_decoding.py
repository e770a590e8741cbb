"""Decoding by one call of C++ against the routed layer's one definition, which the same calls take without it.

Logits are the same sums in another order (tests/tolerance.py); in bfloat16 such a sum may round otherwise, and what is
computed from it: a few parts in 2⁸ of the largest. Decisions are equal: p(execute) is far from θ here.
"""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from qtale_lightning import cpu
from qtale_lightning.models import RoutedCache, RoutedForCausalLM, Routing, decoding, route, routed_config
from qtale_lightning.models.families import classes_of
from qtale_lightning.models.routing import OfUnits
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.lighter import lighten
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import round_to_nearest
from tests.llama import mix_decisions
from tests.tolerance import close, depth

pytestmark = pytest.mark.skipif(not cpu.available(), reason="our CPU operations weren't built here")

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
BATCH, PROMPT, NEW = 3, 7, 6


def made(family: str = "llama", dtype: torch.dtype = torch.float32, **routing: Any) -> RoutedForCausalLM:
    name, more = FAMILIES[family]
    torch.manual_seed(0)
    base = AutoConfig.for_model(
        name,
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.2,
        **more,
    )
    plain = classes_of(base).plain(base)
    for parameter in plain.parameters():
        if parameter.ndim == 1:  # norms and biases, which are all alike at first
            nn.init.normal_(parameter, 1.0, 0.3)
    return mix_decisions(
        route(plain, routed_config(base, router_width=32, start_layer=1, **routing)).to(dtype)
    )


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each token was computed by C++; those of calls in `refused` aren't."""
    taken: list[bool] = []
    original = decoding.next_token

    def spy(*args: Any) -> Tensor | None:
        states = original(*args)
        taken.append(states is not None)
        return states

    monkeypatch.setattr(decoding, "next_token", spy)
    return taken


@contextmanager
def by_layers() -> Iterator[None]:
    """Tokens aren't computed by C++."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "next_token", lambda *args: None)
        yield


def ids(length: int, seed: int = 1, batch: int = BATCH) -> Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def decoded(
    model: RoutedForCausalLM,
    by_steps: Callable[[int], bool],
    routing: Callable[[int], Routing] = lambda step: Routing(),
    batch: int = BATCH,
) -> tuple[list[Tensor], list[Routing], RoutedCache]:
    """Logits and decisions of tokens after a prompt that is padded on the left, and the cache."""
    cache, mask = RoutedCache(), torch.ones(batch, PROMPT + NEW, dtype=torch.long)
    mask[0, :3] = 0
    model(ids(PROMPT, batch=batch), attention_mask=mask[:, :PROMPT], past_key_values=cache)
    logits, routings = [], []
    for step in range(NEW):
        routings.append(routing(step))
        seen = mask[:, : PROMPT + step + 1]
        with nullcontext() if by_steps(step) else by_layers():
            output = model(
                ids(1, step, batch), attention_mask=seen, past_key_values=cache, routing=routings[-1]
            )
        logits.append(output.logits)
    return logits, routings, cache


def same(model: RoutedForCausalLM, found: Any, expected: Any) -> None:
    """Logits, records and caches of two runs."""
    terms = depth(model.config)
    for actual, reference in zip(found[0], expected[0], strict=True):
        if actual.dtype == torch.float32:
            close(actual, reference, terms)
        else:
            largest = float(reference.abs().max())
            torch.testing.assert_close(actual, reference, rtol=2**-6, atol=2**-5 * largest)
    low = model.dtype == torch.bfloat16
    for actual, reference in zip(found[1], expected[1], strict=True):
        assert actual.gates.keys() == reference.gates.keys()
        assert all(torch.equal(actual.gates[layer], gate) for layer, gate in reference.gates.items())
        assert all(actual.gates[layer].dtype == gate.dtype for layer, gate in reference.gates.items())
        assert actual.logits.keys() == reference.logits.keys()
        for layer, logits in reference.logits.items():
            assert actual.logits[layer].shape == logits.shape
            if not low:
                close(actual.logits[layer], logits, terms)
        assert torch.equal(actual.executed(4), reference.executed(4))
    assert found[2].seen == expected[2].seen
    for actual, reference in zip(found[2].layers, expected[2].layers, strict=True):
        assert actual.lengths == reference.lengths
        for row, kept in enumerate(reference.lengths):
            for a, b in ((actual.keys, reference.keys), (actual.values, reference.values)):
                if not low:
                    close(a[row, :, :kept], b[row, :, :kept], terms)
        if reference.noted or reference.places is not None:
            assert torch.equal(actual.recall(), reference.recall())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, dtype: torch.dtype, steps: list[bool]) -> None:
    model = made(family, dtype)
    expected = decoded(model, lambda step: False)
    gates = torch.cat([routing.stacked_gates() for routing in expected[1]])
    assert 0.1 < float(gates.mean()) < 0.95  # mixed, or nothing was tested
    found = decoded(model, lambda step: True)
    assert steps == [True] * NEW
    same(model, found, expected)


@pytest.mark.parametrize("batch", [1, 2, 8, 11])
@pytest.mark.parametrize("bits", [4, 16])
def test_batches(bits: int, batch: int, steps: list[bool]) -> None:
    model = made("qwen2")
    if bits == 4:
        quantize(model, 4)
    expected = decoded(model, lambda step: False, batch=batch)
    found = decoded(model, lambda step: True, batch=batch)
    assert steps == [True] * NEW
    same(model, found, expected)


def quantize(model: RoutedForCausalLM, bits: int) -> None:
    quantize_model(model, round_to_nearest(uniform(linear_shapes(model), bits, {}), 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_in_8_bits(dtype: torch.dtype, steps: list[bool]) -> None:
    """Rounded at the same places; what is added up in another order before is rarely rounded to the next code."""
    model = made(dtype=dtype)
    quantize(model, 4)
    lighten(model, activation_bits=8)
    expected = decoded(model, lambda step: False, lambda step: Routing(forced=forced(step)))
    found = decoded(model, lambda step: True, lambda step: Routing(forced=forced(step)))
    assert steps == [True] * NEW
    for actual, reference in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(actual, reference, rtol=0, atol=2**-5 * float(reference.abs().max()))
    lighten(model)
    plain = decoded(model, lambda step: True, lambda step: Routing(forced=forced(step)))
    assert not torch.equal(plain[0][0], found[0][0])  # the option is seen to change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 6, 8])
def test_weights_of_other_bits(bits: int, dtype: torch.dtype, steps: list[bool]) -> None:
    """In planes, and in two parts of 4 bits."""
    model = made("qwen2", dtype)
    quantize(model, bits)
    expected = decoded(model, lambda step: False)
    found = decoded(model, lambda step: True)
    assert steps == [True] * NEW
    same(model, found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize(("bits", "others"), [(4, 8), (8, 4), (8, 2)])
def test_bits_mixed_among_linears_of_one_input(
    bits: int, others: int, activation_bits: Any, dtype: torch.dtype, steps: list[bool]
) -> None:
    """Each takes the token in a form of its own."""
    model = made(dtype=dtype)
    mixed = uniform(linear_shapes(model), bits, {"*.v_proj": others, "*.up_proj": others})
    quantize_model(model, round_to_nearest(mixed, 32))
    lighten(model, activation_bits)
    expected = decoded(model, lambda step: False, lambda step: Routing(forced=forced(step)))
    found = decoded(model, lambda step: True, lambda step: Routing(forced=forced(step)))
    assert steps == [True] * NEW
    for actual, reference in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(actual, reference, rtol=0, atol=2**-5 * float(reference.abs().max()))


@pytest.mark.parametrize("head_bits", [4, 8])
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads(dtype: torch.dtype, activation_bits: Any, head_bits: Any, steps: list[bool]) -> None:
    """In the same call; of outputs that strips don't divide, too."""
    model = made(dtype=dtype)
    quantize(model, 4)
    lighten(model, activation_bits, head_bits)
    expected = decoded(model, lambda step: False, lambda step: Routing(forced=forced(step)))
    found = decoded(model, lambda step: True, lambda step: Routing(forced=forced(step)))
    assert steps == [True] * NEW
    assert decoding._decoders[model][2].has_head  # type: ignore[union-attr]
    for actual, reference in zip(found[0], expected[0], strict=True):
        assert actual.shape == reference.shape
        torch.testing.assert_close(actual, reference, rtol=0, atol=2**-5 * float(reference.abs().max()))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_tokens_may_go_either_way(family: str, steps: list[bool]) -> None:
    """One cache serves both, at every token."""
    model = made(family)
    expected = decoded(model, lambda step: False)
    for first in (0, 1):
        same(model, decoded(model, lambda step, first=first: step % 2 == first), expected)
    assert steps == [True] * NEW


def forced(step: int, layers: Any = range(4)) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {layer: torch.rand(BATCH, 1, generator=generator) < 0.5 for layer in layers}


def in_one(step: int) -> OfUnits:
    """Of all routed layers, in another order in memory."""
    chosen = torch.rand(BATCH, 3, generator=torch.Generator().manual_seed(step)) < 0.5
    return OfUnits(range(1, 4), chosen.T[:, :, None])


@pytest.mark.parametrize(
    "routing",
    [
        lambda step: Routing(forced=forced(step)),
        lambda step: Routing(forced=forced(step, [2])),
        lambda step: Routing(forced={layer: torch.zeros(BATCH, 1, dtype=torch.bool) for layer in range(4)}),
        lambda step: Routing(forced=in_one(step)),
        lambda step: Routing(threshold=0.0),
        lambda step: Routing(threshold=1.0),
        lambda step: Routing(threshold=[0.2, 0.5, 0.9]),
    ],
)
def test_decisions(routing: Callable[[int], Routing], steps: list[bool]) -> None:
    model = made()
    expected = decoded(model, lambda step: False, routing)
    same(model, decoded(model, lambda step: True, routing), expected)
    assert steps == [True] * NEW


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_tokens_leave_keys_in_layers_that_they_skip(
    family: str, dtype: torch.dtype, steps: list[bool]
) -> None:
    """Every layer keeps every token that isn't padding, and some tokens skip."""
    model = made(family, dtype, keep_kv=True)
    expected = decoded(model, lambda step: False)
    for by_steps in (lambda step: True, lambda step: step % 2 == 0):
        found = decoded(model, by_steps)
        same(model, found, expected)
        assert all(
            layer.lengths == (PROMPT + NEW - 3, *[PROMPT + NEW] * (BATCH - 1)) for layer in found[2].layers
        )
    assert not all(gate.all() for routing in expected[1] for gate in routing.gates.values())
    assert steps == [True] * (NEW + NEW // 2)


@pytest.mark.parametrize("method", ["full", "random"])
def test_methods_that_no_router_decides(method: str, steps: list[bool]) -> None:
    """One that decides nothing is computed by C++; one with decisions of its own isn't."""
    layers = {"full": {"start_layer": 4}, "random": {}}[method]
    model = made()
    config = copy.deepcopy(model.config)
    config.method, config.rate = method, 0.5
    for name, value in layers.items():
        setattr(config, name, value)
    model.attach(config)
    expected = decoded(model, lambda step: False)
    same(model, decoded(model, lambda step: True), expected)
    assert steps == [method == "full"] * NEW


@pytest.mark.parametrize("modes", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {}])
def test_generation(modes: dict[str, Any], steps: list[bool]) -> None:
    model = made("mistral")
    settings = {"max_new_tokens": 8, "pad_token_id": 0, "attention_mask": torch.ones(BATCH, PROMPT)} | modes
    torch.manual_seed(0)
    found = model.generate(ids(PROMPT), **settings)
    assert steps == [True] * 7
    with by_layers():
        torch.manual_seed(0)
        assert torch.equal(model.generate(ids(PROMPT), **settings), found)


def test_threads_share_a_model() -> None:
    """At places far from each other, whose rotations are made again and again."""
    model = made()
    prompts = [ids(length, batch=1) for length in (10, 300, 600)]

    def generate(prompt: Tensor) -> Tensor:
        options = {"max_new_tokens": 50, "min_new_tokens": 50, "pad_token_id": 0, "do_sample": False}
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    expected = [generate(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        found = list(pool.map(generate, prompts))
    assert all(map(torch.equal, found, expected))


def test_ids_of_32_bits(steps: list[bool]) -> None:
    model, cache = made(), RoutedCache()
    model(ids(PROMPT), past_key_values=cache)
    twin = copy.deepcopy(cache)
    found = model(ids(1).int(), past_key_values=cache).logits
    assert torch.equal(found, model(ids(1), past_key_values=twin).logits)
    assert steps == [True, True]


def test_memory_that_moves(steps: list[bool]) -> None:
    """A cache's, a model's, and what a model is computed in: nothing old is read, or kept."""
    model, cache = made(), RoutedCache()
    model(ids(PROMPT), past_key_values=cache)
    model(ids(1), past_key_values=cache)
    for layer in cache.layers:
        layer.keys.share_memory_()
        layer.values.share_memory_()
    model.share_memory()
    twin, rows = copy.deepcopy(cache), torch.tensor([2, 0])
    found = [model(ids(1), past_key_values=cache).logits]
    cache.select(rows)
    found.append(model(ids(1, batch=2), past_key_values=cache).logits)
    assert steps == [True] * 3
    with by_layers():
        close(found[0], model(ids(1), past_key_values=twin).logits, depth(model.config))
        twin.select(rows)
        close(found[1], model(ids(1, batch=2), past_key_values=twin).logits, depth(model.config))
    decoder = weakref.ref(decoding._decoders[model][2])
    model.bfloat16()
    gc.collect()
    assert decoder() is None
    one_token(model)
    assert steps[-1]


def test_weights_that_are_not_a_modules_own(steps: list[bool]) -> None:
    """Parametrized ones, and biases with gaps, are left to the layers; rotations written in place are seen."""
    model = made("qwen2")
    layer = model.model.layers[1]
    layer.self_attn.q_proj.bias = nn.Parameter(torch.randn(256)[::2].clone().repeat(2)[::2], False)
    one_token(model)
    assert steps.pop() is False
    model = made()
    before = one_token(model)
    model.model.rotary_emb.inv_freq.mul_(0.25)
    found = one_token(model)
    with by_layers():
        close(found, one_token(model), depth(model.config))
    assert not torch.allclose(found, before)
    nn.utils.parametrize.register_parametrization(
        model.model.layers[1].mlp.up_proj, "weight", nn.Dropout(0.0)
    )
    assert steps == [True] * 2
    one_token(model)
    assert steps[-1] is False


def test_hooked_models_are_looked_at_once(steps: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model, makings = made(), []
    original = decoding._made
    monkeypatch.setattr(decoding, "_made", lambda *args: makings.append(args) or original(*args))
    handle = model.model.layers[1].register_forward_hook(lambda *args: None)
    cache = RoutedCache()
    model(ids(PROMPT), past_key_values=cache)
    for _ in range(3):
        model(ids(1), past_key_values=cache)
    assert (steps, len(makings)) == ([False] * 3, 1)
    handle.remove()
    model(ids(1), past_key_values=cache)
    assert steps[-1]


def test_forced_decisions_of_one_for_all_sequences(steps: list[bool]) -> None:
    model = made()
    for forced_alike in ({2: torch.tensor([[True]])}, {2: torch.tensor([[False]])}):
        expected = decoded(model, lambda step: False, lambda step, f=forced_alike: Routing(forced=f))
        same(
            model, decoded(model, lambda step: True, lambda step, f=forced_alike: Routing(forced=f)), expected
        )
    assert steps == [True] * (2 * NEW)


def test_unknown_tokens() -> None:
    model, cache = made(), RoutedCache()
    model(ids(PROMPT), past_key_values=cache)
    with pytest.raises(IndexError, match="token 97 of 97"):
        model(torch.full((BATCH, 1), 97), past_key_values=cache)


def test_windows_that_bind_are_not_taken(steps: list[bool]) -> None:
    """And what the steps before kept of places is what the window then goes by."""
    name, _ = FAMILIES["mistral"]
    for window in (PROMPT + 3, PROMPT + NEW):
        steps.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(FAMILIES, "mistral", (name, {"sliding_window": window}))
            model = made("mistral")
        expected = decoded(model, lambda step: False)
        same(model, decoded(model, lambda step: True), expected)
        assert steps == [PROMPT + step + 1 <= window for step in range(NEW)]


def one_token(model: RoutedForCausalLM, cache: RoutedCache | None = None, **options: Any) -> Tensor:
    if cache is None:
        cache = RoutedCache()
        model(ids(PROMPT), past_key_values=cache, routing=Routing(execution="packed", sample=False))
    return model(ids(1), past_key_values=cache, **options).logits


def test_what_is_left_to_the_layers(steps: list[bool]) -> None:
    model = made()
    for options in (
        {"output_hidden_states": True},
        {"routing": Routing(keep=[2])},
        {"routing": Routing(sample=True)},
    ):
        one_token(model, **options)
    one_token(model, RoutedCache())  # layers have kept nothing yet
    with torch.enable_grad():
        one_token(model)
    one_token(model.train(), routing=Routing(execution="packed", sample=False))
    assert steps == [False] * 6
    one_token(model.eval())
    assert steps[-1]


def test_hooks_run(steps: list[bool]) -> None:
    model, seen = made(), []
    one_token(model)
    handle = model.model.layers[3].mlp.register_forward_hook(lambda *args: seen.append(True))
    routing = Routing(threshold=0.0)
    one_token(model, routing=routing)
    assert len(seen) == 2  # the prompt's call, and the token's
    handle.remove()
    one_token(model, routing=routing)
    assert steps == [True, False, True]


def test_changed_weights_are_seen(steps: list[bool]) -> None:
    """Written in place, given a new storage, replaced by another tensor or by another module."""
    model = made()
    layer = model.model.layers[2]

    def halve() -> None:
        layer.mlp.up_proj.weight.mul_(0.5)

    def give_storage() -> None:
        layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight * 3

    def replace() -> None:
        layer.self_attn.o_proj.weight = nn.Parameter(layer.self_attn.o_proj.weight * 2, False)

    def replace_module() -> None:
        layer.self_attn.q_proj = copy.deepcopy(layer.self_attn.q_proj)
        layer.self_attn.q_proj.weight.mul_(-1)

    def reroute() -> None:
        layer.router.out.bias[0].add_(100)  # everybody skips it, but for reserved tokens

    def to_4_bits() -> None:
        quantize(model, 4)

    def adapt() -> None:
        layer.mlp.gate_proj = nn.Sequential(layer.mlp.gate_proj)  # something that isn't known

    before = one_token(model)
    for change in (halve, give_storage, replace, replace_module, reroute, to_4_bits, adapt):
        change()
        found = one_token(model)
        with by_layers():
            expected = one_token(model)
        close(found, expected, depth(model.config))
        assert steps.pop() is (change is not adapt)
        assert change is adapt or not torch.allclose(found, before)
        before = found


def test_changes_between_two_tokens_are_seen(steps: list[bool]) -> None:
    """Of one sequence, at whose tokens after the first only what was counted is looked at."""
    model, cache = made(), RoutedCache()
    layer = model.model.layers[2]
    seen: list[bool] = []

    def nothing() -> None: ...

    def replace() -> None:
        layer.self_attn.o_proj.weight = nn.Parameter(layer.self_attn.o_proj.weight * 2, False)

    def replace_module() -> None:
        layer.mlp.up_proj = copy.deepcopy(layer.mlp.up_proj)
        layer.mlp.up_proj.weight.mul_(3)

    def to_4_bits() -> None:
        quantize(model, 4)

    def to_rounded_tokens() -> None:
        lighten(model, activation_bits=8)

    def to_another_head() -> None:
        lighten(model, activation_bits=8, head_bits=4)

    def hook() -> None:
        layer.mlp.register_forward_hook(lambda *args: seen.append(True))

    model(ids(PROMPT), past_key_values=cache)
    model(ids(1), past_key_values=cache)
    for change in (nothing, replace, replace_module, to_4_bits, to_rounded_tokens, to_another_head, hook):
        change()
        twin = copy.deepcopy(cache)
        found = one_token(model, cache, routing=Routing(threshold=0.0))
        with by_layers():
            expected = one_token(model, twin, routing=Routing(threshold=0.0))
        torch.testing.assert_close(found, expected, rtol=0, atol=2**-5 * float(expected.abs().max()))
        assert steps.pop() is (change not in (to_4_bits, hook))  # layers prepare kernels when they are called
    assert seen


def test_a_model_can_be_copied_and_let_go(steps: list[bool]) -> None:
    model = made()
    found = one_token(model)
    twin = copy.deepcopy(model)
    assert torch.equal(one_token(twin), found)
    assert steps == [True, True]
    gone = weakref.ref(twin.model)
    del twin
    gc.collect()
    assert gone() is None
