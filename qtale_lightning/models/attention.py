"""Attention of a routed layer, in its two executions; registered with transformers as ``routed``."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from qtale_lightning.models.cache import RoutedCacheLayer
from qtale_lightning.models.packing import Packing

ATTENTION = "routed"


@dataclass(frozen=True)
class Masked:
    """Every token is computed: the additive mask ``(B, 1, T, T)`` and the keys' gates ``(B, T)`` (None: all open)."""

    bias: Tensor
    gate: Tensor | None


@dataclass(frozen=True)
class Packed:
    """Executing tokens only: how they were gathered, and the layer's cache."""

    packing: Packing
    cache: RoutedCacheLayer | None


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: Masked, scaling: float, dropout: float
) -> Tensor:
    """Attention with evicted keys, ``(B, T, H, d)`` from a query ``(B, H, T, d)`` and keys, values ``(B, H_kv, T, d)``.

    As D-LLM trains: probabilities of skipped keys are multiplied by their gate and the rest renormalised,
    p'_ij = p_ij w_j / Σ_k p_ik w_k, so that a gradient reaches the router through the attention as well. With all
    gates open the value is that of plain attention up to the rounding of a division by 1.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    # The query heads that share a key head are stacked into one matrix product, instead of repeating the keys.
    scores = query.reshape(batch, groups, -1, width) @ key.transpose(2, 3)
    scores = scores.view(batch, heads, length, length) * scaling + plan.bias
    probabilities = scores.softmax(-1, dtype=torch.float32)
    if plan.gate is not None:
        probabilities = probabilities * plan.gate[:, None, None, :].float()
        # A padding query may have no open key at all: 0 / tiny = 0 instead of NaN.
        probabilities = probabilities / probabilities.sum(-1, keepdim=True).clamp_min(1e-30)
    probabilities = nn.functional.dropout(probabilities.to(value.dtype), dropout)
    output = probabilities.view(batch, groups, -1, length) @ value
    return output.view(batch, heads, length, width).transpose(1, 2)


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, plan: Packed, scaling: float
) -> Tensor:
    """Causal attention among executing tokens, flat ``(1, H, N, d)`` in, ``(1, N, H, d)`` out; keys join the cache."""
    packing, mask = plan.packing, None
    query, key, value = packing.to_rows(query), packing.to_rows(key), packing.to_rows(value)
    if plan.cache is not None:
        key, value, mask = plan.cache.update(key, value, packing)
    output, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=True)
    return packing.from_rows(output)


def routed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    plan: Masked | Packed | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; ``plan`` comes from the routed layer."""
    if plan is None:
        raise ValueError(
            "routed attention runs inside a routed layer only: call the model, not its attention"
        )
    if isinstance(plan, Masked):
        return masked_attention(query, key, value, plan, scaling, dropout), None
    return packed_attention(module, query, key, value, plan, scaling), None


AttentionInterface.register(ATTENTION, routed_attention)
