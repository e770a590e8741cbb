from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qtale_lightning.evaluation import cost


def config(**changes: object) -> SimpleNamespace:
    """Small enough to count by hand: q, o 8x8; k, v 4x8; gate, up 16x8; down 8x16; 576 weights a layer."""
    fields: dict[str, object] = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 10,
        "tie_word_embeddings": False,
    }
    return SimpleNamespace(**(fields | changes))


def routed(**changes: object) -> SimpleNamespace:
    return config(router_width=6, start_layer=1, **changes)


def test_flops_by_hand() -> None:
    # 2 · 576 + 4 · 5 keys · 4 heads · 2 wide
    assert cost.layer_flops(config(), context=5) == 1152 + 160
    assert cost.router_flops(config()) == 0
    assert cost.router_flops(routed()) == 2 * (8 * 6 + 6 * 2)
    assert cost.head_flops(config()) == 2 * 8 * 10
    assert cost.token_flops(config(), [1, 1, 1], context=5) == 3 * 1312 + 160
    assert cost.token_flops(config(), [1, 1, 1], context=5, head=False) == 3 * 1312
    # One full layer; one at 1/2: half the linears, a quarter of the attention; one skipped; two routers.
    expected = 1312 + (1152 / 2 + 160 / 4) + 0 + 2 * 120 + 160
    assert cost.token_flops(routed(), [1, 0.5, 0], context=5) == expected
    assert cost.flops_ratio(routed(), [1, 0.5, 0], context=5) == expected / (3 * 1312 + 160)


def test_keys_and_values_that_are_kept_cost_what_they_do() -> None:
    """All tokens compute k and v, 2 · 64 FLOPs, in every layer; those that execute meet all keys."""
    kept = routed(keep_kv=True)
    expected = 1312 + (128 + (1152 - 128 + 160) / 2) + 128 + 2 * 120 + 160
    assert cost.token_flops(kept, [1, 0.5, 0], context=5) == expected
    assert cost.kv_bytes_per_token(kept, [1, 0.5, 0]) == 3 * 16


def test_sublayers_cost_what_they_compute() -> None:
    """Attention is 192 of a layer's 576 weights; its keys are those of tokens that execute it."""
    apart = routed(gates="sublayer")
    # A full layer; attention at 1/2, the MLP skipped; the MLP at 1/4 alone; four routers.
    expected = 1312 + (384 / 2 + 160 / 4) + 768 / 4 + 4 * 120 + 160
    assert cost.token_flops(apart, [1, 1, 0.5, 0, 0, 0.25], context=5) == expected
    assert cost.kv_bytes_per_token(apart, [1, 1, 0.5, 0, 0, 0.25]) == 1.5 * 16
    assert cost.parameter_counts(apart).routers == 2 * cost.parameter_counts(routed()).routers
    assert cost.expected_execution(apart, 0.5) == [1, 1, 0.25, 0.25, 0.25, 0.25]
    with pytest.raises(ValueError, match="got 3 execution ratios for 3 decoder layers of 2 sublayers"):
        cost.token_flops(apart, [1, 1, 1], context=5)


def test_equal_ratios_cost_the_same_whatever_routers_decide_about() -> None:
    """With routers of half the width; what attention does more, the MLP does less: by weights, without the keys met."""
    narrow = config(router_width=3, start_layer=1, gates="sublayer")
    whole = cost.token_flops(routed(), [1, 0.5, 0.5], context=0)
    assert cost.token_flops(narrow, [1, 1, 0.5, 0.5, 0.5, 0.5], context=0) == whole
    # By the weights 192 and 384: 0.9 · 1/3 + 0.3 · 2/3 = 0.5
    assert cost.token_flops(narrow, [1, 1, 0.9, 0.3, 0.5, 0.5], context=0) == pytest.approx(whole)


def test_stand_ins_cost_two_products_of_every_token() -> None:
    with_them, without = routed(stand_in_rank=2), routed()
    more = cost.token_flops(with_them, [1, 0.5, 0], context=5) - cost.token_flops(
        without, [1, 0.5, 0], context=5
    )
    assert more == 2 * 2 * (8 * 2 + 2 * 8)
    counts = cost.parameter_counts(with_them)
    assert counts.stand_ins == counts.total - cost.parameter_counts(without).total == 2 * (2 * 16 + 8)


def test_flops_ratio_of_the_full_model_is_one() -> None:
    for context in (1, 7.5, 1024):
        assert cost.flops_ratio(config(), [1, 1, 1], context) == 1
    assert cost.flops_ratio(routed(), [1, 1, 1], 5) == 1 + 240 / (3 * 1312 + 160)
    assert cost.flops_ratio(routed(), [1, 1, 1], 5, head=False) == 1 + 240 / (3 * 1312)


def test_head_dim_is_optional() -> None:
    assert cost.linear_shapes(config()) == cost.linear_shapes(config(head_dim=2))
    assert cost.linear_shapes(config(head_dim=4))["k_proj"] == (8, 8)


def test_kv_bytes() -> None:
    assert (
        cost.kv_bytes_per_token(config(), [1, 1, 1]) == 3 * 2 * 2 * 2 * 2
    )  # layers, k and v, heads, wide, bytes
    assert cost.kv_bytes_per_token(routed(), [1, 0.5, 0]) == 1.5 * 16


@pytest.mark.parametrize(
    ("execution", "message"),
    [
        ([1, 1], "2 execution ratios for 3"),
        ([1, 1, 1.5], "layer 2 is 1.5, must be from 0 to 1"),
        ([1, float("nan"), 1], "layer 1 is nan"),
        ([0.5, 1, 1], "layer 0 is 0.5, must be 1: it has no router"),
    ],
)
def test_execution_ratios_must_fit(execution: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cost.token_flops(routed(), execution, context=5)
    with pytest.raises(ValueError, match=message):
        cost.kv_bytes_per_token(routed(), execution)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_parameter_counts_are_those_of_the_model(tied: bool, bias: bool) -> None:
    llama = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=50,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
    )
    model = LlamaForCausalLM(llama)
    counts = cost.parameter_counts(llama)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    for name, number in counts.linears.items():
        weights = [w for key, w in model.named_parameters() if key.endswith(f"{name}.weight")]
        assert number == sum(weight.numel() for weight in weights), name
    assert counts.routers == 0

    router = nn.Sequential(nn.Linear(32, 6), nn.RMSNorm(6), nn.SiLU(), nn.Linear(6, 2))
    llama.router_width, llama.start_layer = 6, 1
    expected = 2 * sum(parameter.numel() for parameter in router.parameters())
    assert cost.parameter_counts(llama).routers == expected
    assert cost.parameter_counts(llama).total == counts.total + expected


def test_parameter_counts_of_llama2_7b() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # the class's defaults are LLaMA-2-7B's shapes
    assert cost.parameter_counts(model.config).total == 6_738_415_616
    assert cost.weight_bytes(model.config, 16) == 2 * 6_738_415_616


def test_weight_bytes_by_hand() -> None:
    rest = (2 * 3 + 1) * 8 + 80 + 80  # norms, embeddings, head
    assert cost.weight_bytes(config(), 16) == 2 * (3 * 576 + rest)
    # 3 · 576 weights in groups of 8: 216 groups, each 8 · 3 bits, a 16-bit scale and a 3-bit zero point.
    assert cost.weight_bytes(config(), 3, group_size=8) == 216 * (24 + 16 + 3) // 8 + 2 * rest
    assert cost.weight_bytes(config(), 4, group_size=4) == 432 * (16 + 16 + 4) // 8 + 2 * rest
    tied = cost.weight_bytes(config(tie_word_embeddings=True), 4, group_size=4)
    assert tied == cost.weight_bytes(config(), 4, group_size=4) - 2 * 80
    one_router = (8 * 6 + 6) + 6 + (6 * 2 + 2)
    for bits in (16, 4):
        more = cost.weight_bytes(routed(), bits, 8) - cost.weight_bytes(config(), bits, 8)
        assert more == 2 * one_router * 4


def test_weight_bytes_refuses() -> None:
    with pytest.raises(ValueError, match="group_size is needed"):
        cost.weight_bytes(config(), 4)
    with pytest.raises(ValueError, match="width 8 of q_proj"):
        cost.weight_bytes(config(), 4, group_size=16)
    with pytest.raises(ValueError, match="bits must be from 2 to 8"):
        cost.weight_bytes(config(), 12, group_size=8)
