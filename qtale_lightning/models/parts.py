"""What a decoded token needs of a model's layers, for what computes all of them at once: C++, and kernels on a GPU."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qtale_lightning.models.fused import FusedAttention, FusedLayer, FusedMLP, FusedRMSNorm

_LINEARS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
"""In the order of `cpu/stack.h`."""


class Parts(NamedTuple):
    """What a decoded token needs of a layer.

    Attributes:
        norms: Weights of the norms before attention and MLP.
        head_norms: Of those of queries and keys, or none.
        weights: Operands of the linears' products, in the order of `cpu/stack.h`.
        biases: Of the linears.
        router: Its operands, or none.
    """

    norms: list[Tensor]
    head_norms: list[Tensor]
    weights: list[tuple[Tensor, ...]]
    biases: list[Tensor | None]
    router: list[Tensor]


def parts_of(model: Any, dtype: torch.dtype) -> list[Parts] | None:
    """The layers' parts, for tokens of a dtype; None where one isn't of `fused`.

    None, too, where something stands in for what a token skips, or that is a part of a layer.
    """
    config, layers = model.config, model.layers
    embed: Any = model.embed_tokens
    plain = type(embed) is nn.Embedding and embed.max_norm is None and embed.weight.is_contiguous()
    if not plain or not isinstance(model.norm, FusedRMSNorm) or model.norm.weight.dtype != dtype:
        return None
    if config.gates != "layer" or config.stand_in_rank or config.hidden_act != "silu":
        return None
    found = [_parts(layer, dtype) if isinstance(layer, FusedLayer) else None for layer in layers]
    return None if any(parts is None for parts in found) else [parts for parts in found if parts is not None]


def _parts(layer: FusedLayer, dtype: torch.dtype) -> Parts | None:
    """A layer's; None where something about it isn't known."""
    attention: Any = layer.self_attn
    norms: list[Any] = [layer.input_layernorm, layer.get_submodule(layer.norm_before_mlp)]
    head_norms: list[Any] = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
    linears: list[Any] = [
        layer.get_submodule(f"{block}.{name}") for block, names in _LINEARS.items() for name in names
    ]
    known = isinstance(attention, FusedAttention) and isinstance(layer.mlp, FusedMLP)
    if not known or not all(isinstance(norm, FusedRMSNorm) for norm in norms + head_norms):
        return None
    weights = [linear.operands(dtype) if hasattr(linear, "operands") else None for linear in linears]
    biases = [linear.bias if hasattr(linear, "bias") else None for linear in linears]
    others = [norm.weight for norm in norms + head_norms] + [bias for bias in biases if bias is not None]
    complete = [operands for operands in weights if operands is not None]
    if len(complete) < len(weights) or not all(fits(other, dtype) for other in others):
        return None
    router = [] if layer.router is None else layer.router.operands(dtype)
    return Parts(
        [norm.weight for norm in norms], [norm.weight for norm in head_norms], complete, biases, router
    )


def fits(vector: Tensor, dtype: torch.dtype) -> bool:
    """Whether a vector is taken as it lies."""
    return vector.dtype == dtype and vector.is_contiguous()
