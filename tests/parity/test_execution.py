"""Masked against packed execution, and both against Hugging Face's LLaMA.

The executions sum the same products in another order (tests/tolerance.py). Where the same operations run in the same
order, equality is exact.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from qtale_lightning import cpu
from qtale_lightning.models import RoutedCache, RoutedForCausalLM, Routing, attention
from tests.parity.conftest import TERMS
from tests.tolerance import close

MakeRouted = Callable[..., RoutedForCausalLM]

pytestmark = pytest.mark.usefixtures("operations")

BATCH, LENGTH = 4, 13


@pytest.fixture(autouse=True, params=[1, 16])
def many_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that attend one after the other, and all at once in rows."""
    monkeypatch.setattr(attention, "MANY_TOKENS", request.param)


def tokens(seed: int = 3) -> Tensor:
    return torch.randint(0, 97, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def padding(side: str) -> Tensor:
    """Ragged sequences of 13, 9, 5 and 1 real tokens."""
    lengths = torch.tensor([LENGTH, 9, 5, 1])
    place = torch.arange(LENGTH)
    mask = place < lengths[:, None] if side == "right" else place >= LENGTH - lengths[:, None]
    return mask.long()


def random_gates(model: RoutedForCausalLM, share: float, seed: int = 5) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {i: torch.rand(BATCH, LENGTH, generator=generator) < share for i in model.config.routed_layers}


@torch.no_grad()
def logits(
    model: RoutedForCausalLM, ids: Tensor, execution: str, mask: Tensor | None = None, **how: object
) -> Tensor:
    routing = Routing(execution=execution, **how)  # type: ignore[arg-type]
    return model(ids, attention_mask=mask, routing=routing, use_cache=False).logits


def check_exact(actual: Tensor, expected: Tensor) -> None:
    """To the last bit, but for the order of a norm's sum, which is our operations' own."""
    if cpu.available():
        close(actual, expected, TERMS)
    else:
        assert torch.equal(actual, expected)


def test_theta_zero_is_exactly_the_base_model(dense: LlamaForCausalLM, routed: RoutedForCausalLM) -> None:
    with torch.no_grad():
        expected = dense(tokens()).logits
    check_exact(logits(routed, tokens(), "packed", threshold=0.0), expected)


def test_all_gates_on_is_exactly_the_base_model(dense: LlamaForCausalLM, routed: RoutedForCausalLM) -> None:
    forced = {i: torch.ones(BATCH, LENGTH, dtype=torch.bool) for i in routed.config.routed_layers}
    with torch.no_grad():
        expected = dense(tokens()).logits
    check_exact(logits(routed, tokens(), "packed", forced=forced), expected)
    # Masked execution divides by the gates' sum of probabilities, 1 up to rounding.
    close(logits(routed, tokens(), "masked", forced=forced), expected, TERMS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_theta_zero_with_padding_equals_hugging_face(
    dense: LlamaForCausalLM, routed: RoutedForCausalLM, side: str
) -> None:
    mask = padding(side)
    with torch.no_grad():
        expected = dense(tokens(), attention_mask=mask).logits
    for execution in ("packed", "masked"):
        actual = logits(routed, tokens(), execution, mask, threshold=0.0)
        close(actual[mask.bool()], expected[mask.bool()], TERMS)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_masked_equals_packed_for_random_gates(
    routed: RoutedForCausalLM, share: float, side: str | None
) -> None:
    mask = None if side is None else padding(side)
    forced = random_gates(routed, share)
    masked = logits(routed, tokens(), "masked", mask, forced=forced)
    packed = logits(routed, tokens(), "packed", mask, forced=forced)
    real = slice(None) if mask is None else mask.bool()
    close(packed[real], masked[real], TERMS)


@pytest.mark.parametrize("side", ["left", "right"])
def test_masked_equals_packed_for_the_routers_own_decisions(routed: RoutedForCausalLM, side: str) -> None:
    mask = padding(side)
    routings = {execution: Routing(execution=execution) for execution in ("masked", "packed")}
    outputs = {}
    for execution, routing in routings.items():
        with torch.no_grad():
            outputs[execution] = routed(
                tokens(), attention_mask=mask, routing=routing, use_cache=False
            ).logits
    gates = routings["masked"].stacked_gates()
    assert 0.2 < gates[:, mask.bool()].mean() < 0.8  # the fixture's routers do decide
    assert torch.equal(gates, routings["packed"].stacked_gates())
    close(outputs["packed"][mask.bool()], outputs["masked"][mask.bool()], TERMS)


def test_masked_equals_packed_without_reserved_but_one_token(make_routed: MakeRouted) -> None:
    model = make_routed(start_layer=0, reserved_tokens=1)
    forced = random_gates(model, 0.3)
    close(
        logits(model, tokens(), "packed", forced=forced),
        logits(model, tokens(), "masked", forced=forced),
        TERMS,
    )


def test_a_layer_that_nobody_executes_is_not_called(make_routed: MakeRouted) -> None:
    model = make_routed(reserved_tokens=1)
    layer = model.model.layers[2]
    calls = []
    layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    cache = RoutedCache()
    with torch.no_grad():
        model(tokens()[:, :4], past_key_values=cache, routing=Routing())
        calls.clear()
        nobody = {i: torch.zeros(BATCH, 1, dtype=torch.bool) for i in model.config.routed_layers}
        before = cache.layer(2).lengths
        model(tokens()[:, 4:5], past_key_values=cache, routing=Routing(forced=nobody))
    assert not calls
    assert cache.layer(2).lengths == before


@torch.no_grad()
def test_others_see_the_kept_keys_of_a_token_that_skips(routed: RoutedForCausalLM) -> None:
    """One token skips layer 3: behind it all others are as in the dense model, and without kept keys they aren't."""
    forced = {i: torch.ones(BATCH, LENGTH, dtype=torch.bool) for i in routed.config.routed_layers}
    dense = Routing(forced=forced, keep=[4])
    routed(tokens(), routing=dense, use_cache=False)
    forced = {**forced, 3: torch.arange(LENGTH).expand(BATCH, LENGTH) != 5}
    others, behind = forced[3], {}
    for keep_kv in (False, True):
        routed.config.keep_kv = keep_kv
        routing = Routing(forced=forced, keep=[4])
        routed(tokens(), routing=routing, use_cache=False)
        behind[keep_kv] = routing.states[4]
        assert (routing.states[4] - dense.states[4])[~others].abs().max() > 0.1
    close(behind[True][others], dense.states[4][others], TERMS)
    assert (behind[False] - dense.states[4])[others].abs().max() > 1e-2


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_of_n_equals_batch_of_one(routed: RoutedForCausalLM, side: str) -> None:
    mask = padding(side)
    batched = logits(routed, tokens(), "packed", mask)
    for row in range(BATCH):
        real = mask[row].bool()
        alone = logits(routed, tokens()[row : row + 1, real], "packed")
        close(batched[row, real], alone[0], TERMS)


def test_two_calls_equal_one(routed: RoutedForCausalLM) -> None:
    first = logits(routed, tokens(), "packed")
    logits(routed, tokens(9), "packed")
    assert torch.equal(logits(routed, tokens(), "packed"), first)


def test_reserved_tokens_are_counted_behind_padding(routed: RoutedForCausalLM) -> None:
    nothing = {i: torch.zeros(BATCH, LENGTH, dtype=torch.bool) for i in routed.config.routed_layers}
    routing, mask = Routing(forced=nothing), padding("left")
    with torch.no_grad():
        routed(tokens(), attention_mask=mask, routing=routing, use_cache=False)
    expected = mask.bool() & (mask.cumsum(1) <= 2)
    for gate in routing.gates.values():
        assert torch.equal(gate, expected)


def test_what_cannot_work_is_refused(routed: RoutedForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"threshold 1.5 .* \[0, 1\]"):
        routed(tokens(), routing=Routing(threshold=1.5))
    with pytest.raises(ValueError, match="packed execution with a cache"):
        routed(tokens(), routing=Routing(execution="masked"), past_key_values=RoutedCache())
    cache = RoutedCache()
    routed(tokens(), past_key_values=cache)
    with pytest.raises(ValueError, match="mask of all of them"):
        routed(tokens()[:, :1], attention_mask=torch.ones(BATCH, 1), past_key_values=cache)


@pytest.mark.parametrize("keep_kv", [False, True])
@pytest.mark.parametrize("execution", ["masked", "packed"])
def test_branches_of_a_prompt_equal_each_continuation_alone(
    routed: RoutedForCausalLM, execution: str, keep_kv: bool
) -> None:
    """Two continuations, of 3 and 2 tokens, behind one prompt of 4; a row of padding and another one beside."""
    routed.config.keep_kv = keep_kv
    prompt, first, second = tokens()[0, :4], tokens()[1, :3], tokens()[2, :2]
    ids = torch.stack([torch.cat([prompt, first, second, prompt[:1]]), tokens()[3, :10]])
    branch = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2], [0] * 10]).unsqueeze(-1)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6], list(range(10))])
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 9] = 0
    routing = Routing(execution=execution, branch=branch)  # type: ignore[arg-type]
    with torch.no_grad():
        together = routed(
            ids, attention_mask=mask, position_ids=positions, routing=routing, use_cache=False
        ).logits
    for places, continuation in (([0, 1, 2, 3, 4, 5, 6], first), ([0, 1, 2, 3, 7, 8], second)):
        alone = logits(routed, torch.cat([prompt, continuation])[None], "packed")
        close(together[0, places], alone[0], TERMS)
    close(together[1], logits(routed, ids[1:], "packed")[0], TERMS)


@pytest.mark.parametrize("execution", ["masked", "packed"])
def test_branches_of_branches_equal_each_path_alone(routed: RoutedForCausalLM, execution: str) -> None:
    """A beginning of 3 tokens; two questions of 2 behind it; two answers of 1 and 2 behind each question."""
    ids = tokens()[0, :13]
    # By token: the question, and the answer behind it.
    branch = [(0, 0)] * 3 + [(1, 0)] * 2 + [(1, 1)] + [(1, 2)] * 2 + [(2, 0)] * 2 + [(2, 1)] + [(2, 2)] * 2
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 5, 6, 3, 4, 5, 5, 6]])
    routing = Routing(execution=execution, branch=torch.tensor([branch]))  # type: ignore[arg-type]
    with torch.no_grad():
        together = routed(ids[None], position_ids=positions, routing=routing, use_cache=False).logits[0]
    for answer in ([3, 4, 5], [3, 4, 6, 7], [8, 9, 10], [8, 9, 11, 12]):
        path = [0, 1, 2, *answer]
        alone = logits(routed, ids[path][None], "packed")[0]
        close(together[path], alone, TERMS)


def test_branches_and_a_cache_are_refused(routed: RoutedForCausalLM) -> None:
    branch = torch.zeros(BATCH, tokens().shape[1], 1, dtype=torch.long)
    with pytest.raises(ValueError, match="leave the cache out"):
        routed(tokens(), past_key_values=RoutedCache(), routing=Routing(branch=branch))
