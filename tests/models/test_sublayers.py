"""Attention and MLP decided about apart: against both written out, and all that follows from units that aren't layers.

Masked and packed execution, and calls that share a cache, are held to each other in tests/properties/test_execution.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qtale_lightning.evaluation.budget import Pass, find_threshold, search_threshold
from qtale_lightning.evaluation.scoring import Scores
from qtale_lightning.losses import ratio_loss
from qtale_lightning.metrics import ExecutionRatio
from qtale_lightning.models import RoutedForCausalLM, Routing, route
from qtale_lightning.quantization.calibration import collect_moments, layer_by_layer, padded_batches
from qtale_lightning.quantization.routers import check_routers
from tests.llama import llama_config, mix_decisions
from tests.tolerance import close, depth

ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # as the operation of a whole step takes it
    "initializer_range": 0.2,
}
# Weights of q, k, v and o, and of gate, up and down: what units count by.
ATTENTION, MLP = 64 * 128 * 2 + 64 * 64 * 2, 3 * 64 * 96
SHARE = ATTENTION / (ATTENTION + MLP)


@pytest.fixture
def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**ARCHITECTURE)).eval()


@pytest.fixture
def model(dense: LlamaForCausalLM) -> RoutedForCausalLM:
    """Its weights, with mixed decisions about the sublayers of layers 1 to 3."""
    torch.manual_seed(1)
    options = {"router_width": 32, "start_layer": 1, "reserved_tokens": 2, "gates": "sublayer"}
    copy = LlamaForCausalLM(dense.config).eval()
    copy.load_state_dict(dense.state_dict())
    return mix_decisions(route(copy, llama_config(**ARCHITECTURE, **options)))


def ids(batch: int = 3, length: int = 12) -> Tensor:
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def written_out(dense: LlamaForCausalLM, tokens: Tensor, gates: dict[int, Tensor]) -> Tensor:
    """y = x + g_a · attn(norm(x)), z = y + g_m · mlp(norm(y)), by the dense model's weights; the final norm's output.

    A key counts by its gate: p_ij g_j / Σ_k p_ik g_k.
    """
    x = dense.model.embed_tokens(tokens)
    batch, length, _ = x.shape
    cos, sin = dense.model.rotary_emb(x, torch.arange(length)[None])
    later = torch.ones(length, length, dtype=torch.bool).triu(1)

    def turned(heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, -1)
        return heads * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    for index, layer in enumerate(dense.model.layers):
        of_attention, of_mlp = (gates.get(2 * index + i, torch.ones(batch, length)) for i in range(2))
        normed, attention = layer.input_layernorm(x), layer.self_attn
        query, key, value = (
            project(normed).view(batch, length, -1, 32).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = turned(query), turned(key).repeat_interleave(2, 1)
        p = (query @ key.transpose(2, 3) / 32**0.5).masked_fill(later, -torch.inf).exp()
        p = p * of_attention[:, None, None]
        mixed = p / p.sum(-1, keepdim=True) @ value.repeat_interleave(2, 1)
        x = x + of_attention[..., None] * attention.o_proj(mixed.transpose(1, 2).flatten(2))
        x = x + of_mlp[..., None] * layer.mlp(layer.post_attention_layernorm(x))
    return dense.model.norm(x)


def decisions(model: RoutedForCausalLM) -> dict[int, Tensor]:
    """Of the free tokens of `ids`, anything: with gradients, as in training. Reserved ones execute."""
    generator = torch.Generator().manual_seed(2)
    drawn = {
        unit: (torch.rand(3, 12, generator=generator) < 0.6).float() for unit in model.config.routed_units
    }
    for gate in drawn.values():
        gate[:, :2] = 1
        gate.requires_grad_()
    return drawn


def test_outputs_and_gradients_are_those_of_both_sublayers_written_out(
    dense: LlamaForCausalLM, model: RoutedForCausalLM
) -> None:
    found: list[tuple[Tensor, dict[int, Tensor]]] = []
    weights = torch.randn(3, 12, 64, generator=torch.Generator().manual_seed(3))
    for ours in (True, False):
        gates = decisions(model)
        if ours:
            routing = Routing(execution="masked", forced=gates)
            output = model.model(ids(), routing=routing, use_cache=False).last_hidden_state
        else:
            output = written_out(dense, ids(), gates)
        (output * weights).sum().backward()
        found.append((output, {unit: gate.grad[:, 2:] for unit, gate in gates.items()}))  # type: ignore[index]
    (output, gradients), (expected, expected_gradients) = found
    close(output, expected, depth(model.config))
    assert [*gradients] == [2, 3, 4, 5, 6, 7]
    for unit, gradient in gradients.items():
        assert gradient.abs().min() > 0
        close(gradient, expected_gradients[unit], 2 * depth(model.config))  # forward and back


def test_at_theta_0_it_is_the_dense_model(dense: LlamaForCausalLM, model: RoutedForCausalLM) -> None:
    with torch.no_grad():
        found = model(ids(), routing=Routing(threshold=0.0), use_cache=False).logits
        close(found, dense(ids()).logits, depth(model.config))


@pytest.mark.parametrize("kept", [1, 3])
@torch.no_grad()
def test_a_last_layer_that_is_asked_for_some_decides_about_all(model: RoutedForCausalLM, kept: int) -> None:
    whole, some = Routing(), Routing()
    expected = model(ids(), routing=whole, use_cache=False).logits
    seen: list[int] = []
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda mlp, args: seen.append(args[0].numel() // 64))
    found = model(ids(), routing=some, use_cache=False, logits_to_keep=kept).logits
    close(found, expected[:, -kept:], depth(model.config))
    assert sum(seen) <= 3 * kept
    assert [*some.gates] == [*whole.gates] == [2, 3, 4, 5, 6, 7]
    for unit, gate in whole.gates.items():
        assert torch.equal(gate, some.gates[unit])
        assert 0 < gate.float().mean() < 1


@torch.no_grad()
def test_writing_is_whole_passes(model: RoutedForCausalLM) -> None:
    """Token by token, where layers that are decided about as a whole would be computed by one call of C++."""
    written = model.generate(ids(2, 7), max_new_tokens=6, do_sample=False)
    for length in range(7, 13):
        logits = model(written[:, :length], use_cache=False).logits[:, -1]
        assert torch.equal(logits.argmax(-1), written[:, length])


@torch.no_grad()
def test_a_pass_that_resumes_is_a_whole_one(model: RoutedForCausalLM) -> None:
    """The first θ that differs is that of layer 2's MLP: layer 2 is the first that is computed again."""
    one, other = [0.5] * 6, [0.5, 0.5, 0.5, 0.1, 0.5, 0.5]
    routing = Routing(threshold=one, keep=[2])
    model(ids(), routing=routing, use_cache=False)
    routing.threshold, routing.resume = other, 2
    whole = Routing(threshold=other)
    resumed = model(ids(), routing=routing, use_cache=False).logits
    close(resumed, model(ids(), routing=whole, use_cache=False).logits, depth(model.config))
    assert torch.equal(routing.executed(8), whole.executed(8))
    with pytest.raises(ValueError, match="3 thresholds for 6 routed sublayers"):
        model(ids(), routing=Routing(threshold=[0.5] * 3), use_cache=False)


def test_the_ratio_loss_weighs_sublayers_by_their_weights() -> None:
    """Of 4 layers, two with routers: one token executes all but an MLP, the other an attention alone."""
    gates = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]], [[1.0, 0.0]], [[0.0, 0.0]]], requires_grad=True)
    routing = Routing(shares=(0.25, 0.75), gates=dict(zip(range(4, 8), gates, strict=True)))
    executed = routing.stacked_shares()
    assert executed.tolist() == [[[1.0, 0.75]], [[0.25, 0.0]]]
    loss = ratio_loss(executed, 4, 0.8, torch.ones(1, 2, dtype=torch.bool))
    # Shares of all: (2 + 1.25) / 4 and (2 + 0.75) / 4; distances to 0.8 are 0.0125 above and 0.1125 below.
    assert loss.item() == pytest.approx((0.0125 + 0.1125) / 2)
    loss.backward()
    attention, mlp = 0.25 / 4 / 2, 0.75 / 4 / 2  # over the layers, over the tokens
    expected = [[[attention, -attention]], [[mlp, -mlp]]] * 2
    torch.testing.assert_close(gates.grad, torch.tensor(expected))


@torch.no_grad()
def test_the_execution_ratio_is_the_share_of_weights_that_is_computed(model: RoutedForCausalLM) -> None:
    """Counted by the tokens that reach the linears."""
    computed = torch.zeros(4)
    for index, layer in enumerate(model.model.layers):
        for block, weight in ((layer.self_attn.k_proj, SHARE), (layer.mlp.up_proj, 1 - SHARE)):

            def count(_: Any, args: Any, index: int = index, weight: float = weight) -> None:
                computed[index] += weight * args[0].numel() / 64

            block.register_forward_pre_hook(count)
    routing = Routing(align=False)
    model(ids(), routing=routing, use_cache=False)
    ratio = ExecutionRatio(4, shares=model.config.unit_shares)
    ratio.update(routing)
    torch.testing.assert_close(ratio.compute(), computed / 36)
    assert ratio.by_unit().shape == (8,)
    assert ratio.compute()[0] == 1


def test_a_budget_counts_decisions_by_what_they_are_worth() -> None:
    """8 layers of tokens, two of them routed: MLPs, which are 3 of 4 of a layer, fall to θ before attention does."""
    generator = torch.Generator().manual_seed(0)
    gaps = [torch.randn(1000, generator=generator) * 2 + center for center in (3.0, -1.0, 2.0, 0.0)]
    shares = (0.25, 0.75)

    class Made:
        def watch(self, theta: Any) -> Pass:
            executed = [(gap >= torch.tensor(theta).logit()).float().mean().item() for gap in gaps]
            ratio = (6 + sum(shares[i % 2] * share for i, share in enumerate(executed))) / 8
            numbers = [gap.double().numpy() for gap in gaps]
            return Pass(ratio, 1.0, 8000, numbers, Scores([], [], 0, 0.0), shares)

    made: Any = Made()
    for budget in (0.95, 0.9, 0.8):
        found = search_threshold(made.watch, budget)
        assert found is not None
        assert found.at.ratio == pytest.approx(budget, abs=0.005)
        first = made.watch(0.5)
        assert found.theta == find_threshold(made, budget).theta
        assert abs(first.ratio - budget) > 0.005  # else nothing was searched


def test_quantization_measures_each_sublayer_on_its_own_tokens(model: RoutedForCausalLM) -> None:
    rows = [row.tolist() for row in ids()]
    routing = Routing()
    with torch.no_grad():
        model(ids(), routing=routing, use_cache=False)
    seen = []
    for layer, run in layer_by_layer(model, padded_batches(rows)):
        moments = collect_moments(layer, run, 1)
        seen += [moments["self_attn.q_proj"].tokens, moments["mlp.gate_proj"].tokens]
    assert seen == routing.executed(8).tolist()
    assert len(set(seen)) > 3


def test_it_is_saved_and_loaded_and_nothing_else_takes_its_weights(
    model: RoutedForCausalLM, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        close(loaded(ids()).logits, model(ids()).logits, depth(model.config))
    assert loaded.config.gates == "sublayer"
    assert {p.dtype for n, p in loaded.bfloat16().named_parameters() if ".router." in n} == {torch.float32}
    config = AutoModelForCausalLM.from_pretrained(tmp_path).config
    config.gates = "layer"
    with pytest.raises(ValueError, match=r"gates layer\): left over .*mlp.router"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config)


def test_what_it_does_not_go_with_is_refused(model: RoutedForCausalLM) -> None:
    with pytest.raises(ValueError, match="decide about sublayers, and only those of layers can be fitted"):
        check_routers(model)
    for other in ({"keep_kv": True}, {"stand_in_rank": 4}):
        with pytest.raises(StrictDataclassError, match="neither keep_kv nor stand_in_rank"):
            llama_config(**ARCHITECTURE, gates="sublayer", **other)


def test_layers_before_the_first_have_no_router(model: RoutedForCausalLM) -> None:
    routers = [(layer.router, layer.mlp.router) for layer in model.model.layers]
    assert routers[0] == (None, None)
    assert all(isinstance(router, nn.Module) for pair in routers[1:] for router in pair)
