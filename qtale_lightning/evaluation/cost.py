"""Counted cost of a model of a declared family with routed layers: FLOPs, parameters and bytes. Nothing is measured.

A multiply-add counts as 2 FLOPs. Only matrix products are counted (linears, attention scores and values,
routers, `lm_head`); norms, activations, softmax, rotary embeddings and bias additions are not.

Configurations are Hugging Face's (`model_type`, `hidden_size`, …) plus fields of routed models: `router_width` (absent
or None: nothing is routed), `start_layer`, the first layer that tokens may skip, the `method` that decides (absent: one
with routers), `gates`, what it decides about (absent: layers), and `dropped_layers` of the base model, which the model
was made without.

`execution` is the share of tokens that execute each unit of the base model's layers, in their order: each layer, or
where sublayers are decided about apart, each layer's attention and MLP.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qtale_lightning.architectures import architecture_of, head_width, unit_shares
from qtale_lightning.quantization.rtn import check_quantizable
from qtale_lightning.routing import method_of

FULL_BITS = 16  # unquantized weights: bfloat16
ROUTER_BITS = 32  # routers stay in float32
SCALE_BITS = 16  # a quantized group's scale: float16
KV_BYTES = 2  # keys and values: bfloat16


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of a whole model.

    Attributes:
        linears: weights of all layers by linear (`q_proj`, …, `down_proj`): what quantization shrinks.
        biases: of the linears.
        head: 0 where `lm_head` is tied to the embeddings.
    """

    linears: dict[str, int]
    biases: int
    norms: int
    embeddings: int
    head: int
    routers: int
    stand_ins: int

    @property
    def total(self) -> int:
        rest = self.biases + self.norms + self.embeddings + self.head + self.routers + self.stand_ins
        return sum(self.linears.values()) + rest


def linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """Weight shapes `(out, in)` of one decoder layer's linears, by their own names."""
    return {name.rpartition(".")[2]: shape for name, shape in architecture_of(config).shapes(config).items()}


def base_layers(config: Any) -> int:
    """Number of the base model's decoder layers, of which execution ratios are shares."""
    return config.num_hidden_layers + len(_dropped(config))


def _dropped(config: Any) -> Sequence[int]:
    return getattr(config, "dropped_layers", None) or ()


def decided_layers(config: Any) -> range:
    """Indices of the decoder layers that tokens may skip."""
    if getattr(config, "router_width", None) is None:
        return range(0)
    return range(config.start_layer, config.num_hidden_layers)


def routed_layers(config: Any) -> range:
    """Indices of the decoder layers that have a router."""
    return decided_layers(config) if method_of(getattr(config, "method", "qtale")).routers else range(0)


def _units(config: Any) -> int:
    """What is decided about in a layer."""
    return len(unit_shares(config))


def _routers(config: Any) -> int:
    """Number of routers."""
    return len(routed_layers(config)) * _units(config)


def expected_execution(config: Any, target_ratio: float) -> list[float]:
    """Each unit's execution ratio where a token executes `target_ratio` of all layers, as far as the model can."""
    layers, decided, dropped = base_layers(config), decided_layers(config), _dropped(config)
    always = layers - len(decided) - len(dropped)
    each = max(0.0, (target_ratio * layers - always) / len(decided)) if decided else 1.0
    of_layers = [0.0 if i in dropped else each if i in decided else 1.0 for i in range(layers)]
    return [ratio for ratio in of_layers for _ in range(_units(config))]


def layer_flops(config: Any, context: float) -> float:
    """FLOPs of one token in one decoder layer that executes, its router left out.

        2 · (linear weights) + 4 · context · heads · head_dim

    Args:
        context: keys that the token attends to, its own included: (T + 1) / 2 on average in T tokens.
    """
    weights = sum(outputs * inputs for outputs, inputs in linear_shapes(config).values())
    return 2.0 * weights + 4.0 * context * config.num_attention_heads * head_width(config)


def _mlp_flops(config: Any) -> float:
    """FLOPs of one token in the MLP of one decoder layer."""
    return 2.0 * architecture_of(config).sublayers(config)["mlp"]


def _left_flops(config: Any) -> float:
    """FLOPs of one token's keys and values in one decoder layer."""
    shapes = linear_shapes(config)
    return 2.0 * sum(outputs * inputs for outputs, inputs in (shapes["k_proj"], shapes["v_proj"]))


def router_flops(config: Any) -> float:
    """FLOPs of one token in one router (hidden → width → 2); 0 for a model without routers."""
    return 2.0 * config.router_width * (config.hidden_size + 2) if routed_layers(config) else 0.0


def head_flops(config: Any) -> float:
    """FLOPs of one token in `lm_head`."""
    return 2.0 * config.hidden_size * config.vocab_size


def token_flops(config: Any, execution: Sequence[float], context: float, head: bool = True) -> float:
    """Expected FLOPs of one token in the whole model, routers included.

        Σ_l [ r_l · layer_flops(r_l · context) + router_flops, where l has a router ] + head_flops

    and what stands in for layers that tokens skip, if anything does. Where sublayers are decided about apart, r_l is
    the attention's, the MLP's FLOPs count by its own, and a layer has two routers.

    A token executes layer l with probability r_l and then meets only the keys of tokens that executed it too,
    so attention costs r_l² of the full model's. This takes executions of different tokens to be independent. Where
    keys and values of skipping tokens are kept (`keep_kv`), all tokens compute them, and attention costs r_l.

    Args:
        execution: r_l of each unit of the base model's layers, in 0..1; 1 for one that can't be skipped, 0 for one that
            was dropped.
        context: tokens up to and including this one, see `layer_flops`.
        head: whether `lm_head` runs for this token.

    Raises:
        ValueError: the ratios don't fit the configuration.
    """
    _check_execution(config, execution)
    if getattr(config, "keep_kv", False):
        left = _left_flops(config)
        layers = sum(ratio * (layer_flops(config, context) - left) + left for ratio in execution)
    else:
        attention, mlp = execution[:: _units(config)], execution[_units(config) - 1 :: _units(config)]
        layers = sum(ratio * layer_flops(config, ratio * context) for ratio in attention)
        layers += _mlp_flops(config) * sum(more - ratio for more, ratio in zip(mlp, attention, strict=True))
    routers = _routers(config) * router_flops(config)
    stand_ins = len(decided_layers(config)) * 4.0 * config.hidden_size * _stand_in_rank(config)
    return layers + routers + stand_ins + (head_flops(config) if head else 0.0)


def flops_ratio(config: Any, execution: Sequence[float], context: float, head: bool = True) -> float:
    """`token_flops` over those of the base model, which executes every layer and has no routers.

    Routers cost something: the ratio is above 1 where a routed model executes everything.
    """
    dense = base_layers(config) * layer_flops(config, context)
    return token_flops(config, execution, context, head) / (dense + (head_flops(config) if head else 0.0))


def parameter_counts(config: Any) -> ParameterCounts:
    """Counts a model's parameters by kind; tied embeddings once."""
    layers, hidden, shapes = config.num_hidden_layers, config.hidden_size, linear_shapes(config)
    family = architecture_of(config)
    biased = [name.rpartition(".")[2] for name in family.biased(config)]
    embeddings = config.vocab_size * hidden
    routers = 0
    if routed_layers(config):
        width = config.router_width
        one_router = (hidden * width + width) + width + (width * 2 + 2)  # linear, RMSNorm, linear
        routers = _routers(config) * one_router
    return ParameterCounts(
        linears={name: layers * outputs * inputs for name, (outputs, inputs) in shapes.items()},
        biases=layers * sum(shapes[name][0] for name in biased),
        norms=(layers * len(family.norms) + 1) * hidden
        + layers * len(family.head_norms) * head_width(config),
        embeddings=embeddings,
        head=0 if config.tie_word_embeddings else embeddings,
        routers=routers,
        stand_ins=len(decided_layers(config)) * _stand_in_parameters(config),
    )


def _stand_in_rank(config: Any) -> int:
    return getattr(config, "stand_in_rank", 0)


def _stand_in_parameters(config: Any) -> int:
    """Of one layer's stand-in: two linears, the second with a bias."""
    rank, hidden = _stand_in_rank(config), config.hidden_size
    return 2 * rank * hidden + hidden if rank else 0


def weight_bytes(config: Any, bits: float, group_size: int | None = None) -> int:
    """Bytes of a model's stored weights, packed tightly.

    At 16 bits every weight takes 2 bytes. Below, the decoder layers' linears take `bits` a weight, plus a
    16-bit scale and a `bits`-wide zero point a group (`bits` may be an average over linears); embeddings,
    `lm_head`, norms and biases take 2 bytes. Routers are float32 always.

    Args:
        group_size: inputs that share a scale; needed below 16 bits.

    Raises:
        ValueError: `bits` is neither 16 nor in 2..8, or the group size is missing or doesn't divide a width.
    """
    counts = parameter_counts(config)
    linear_weights = sum(counts.linears.values())
    rest_bits = FULL_BITS * (counts.total - linear_weights - counts.routers) + ROUTER_BITS * counts.routers
    if bits == FULL_BITS:
        return (FULL_BITS * linear_weights + rest_bits) // 8
    if group_size is None:
        raise ValueError(f"group_size is needed for the size at {bits} bits")
    check_quantizable(linear_shapes(config), math.ceil(bits), group_size)
    group_bits = group_size * bits + SCALE_BITS + bits
    return math.ceil((linear_weights // group_size * group_bits + rest_bits) / 8)


def kv_bytes_per_token(config: Any, execution: Sequence[float]) -> float:
    """Expected bytes that one token leaves in the key-value cache (bfloat16): in layers it executes, or in all.

    Raises:
        ValueError: the ratios don't fit the configuration.
    """
    _check_execution(config, execution)
    attention = execution[:: _units(config)]
    layers = config.num_hidden_layers if getattr(config, "keep_kv", False) else sum(attention)
    return layers * 2 * config.num_key_value_heads * head_width(config) * KV_BYTES


def _check_execution(config: Any, execution: Sequence[float]) -> None:
    units = _units(config)
    if len(execution) != base_layers(config) * units:
        what = "decoder layers" if units == 1 else f"decoder layers of {units} sublayers"
        raise ValueError(f"got {len(execution)} execution ratios for {base_layers(config)} {what}")
    decided, dropped = decided_layers(config), _dropped(config)
    for unit, ratio in enumerate(execution):
        layer = unit // units
        if not 0 <= ratio <= 1:
            raise ValueError(f"the execution ratio of layer {layer} is {ratio}, must be from 0 to 1")
        if layer in dropped:
            if ratio != 0:
                raise ValueError(
                    f"the execution ratio of layer {layer} is {ratio}, must be 0: it was dropped"
                )
        elif ratio != 1 and layer not in decided:
            raise ValueError(f"the execution ratio of layer {layer} is {ratio}, must be 1: it has no router")
