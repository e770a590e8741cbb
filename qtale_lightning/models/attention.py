"""Attention of a routed layer, in its two executions: among all tokens with evicted keys, or among executing ones."""

from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from qtale_lightning.models.cache import RoutedCacheLayer
from qtale_lightning.models.packing import Packing, branch_mask


class Attention(Protocol):
    """One layer's attention, ``(B, T, H, d)``, from query ``(B, T, H, d)`` and key, value ``(B, T, H_kv, d)``."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float
    ) -> Tensor: ...


@dataclass(frozen=True)
class Masked:
    """Among all tokens: the additive mask ``(B, 1, T, T)`` and the keys' gates ``(B, T)`` (None: all open).

    As D-LLM trains: probabilities of skipped keys are multiplied by their gate and the rest renormalised,
    p'_ij = p_ij w_j / Σ_k p_ik w_k, so that a gradient reaches the router through the attention as well. With all
    gates open the value is that of plain attention up to the rounding of a division by 1.
    """

    bias: Tensor
    gate: Tensor | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See :class:`Attention`."""
        batch, length, heads, width = query.shape
        groups = key.shape[2]
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        # The query heads that share a key head are stacked into one matrix product, instead of repeating the keys.
        scores = query.reshape(batch, groups, -1, width) @ key.transpose(2, 3)
        scores = scores.view(batch, heads, length, length) * scaling + self.bias
        probabilities = scores.softmax(-1, dtype=torch.float32)
        if self.gate is not None:
            probabilities = probabilities * self.gate[:, None, None, :].float()
            # A padding query may have no open key at all: 0 / tiny = 0 instead of NaN.
            probabilities = probabilities / probabilities.sum(-1, keepdim=True).clamp_min(1e-30)
        probabilities = nn.functional.dropout(probabilities.to(value.dtype), dropout)
        output = probabilities.view(batch, groups, -1, length) @ value
        return output.view(batch, heads, length, width).transpose(1, 2)


@dataclass(frozen=True)
class Packed:
    """Causally among executing tokens, flat ``(1, N)`` in and out.

    Attributes:
        packing: How they were gathered.
        cache: The layer's.
        branch: See :class:`~qtale_lightning.models.routing.Routing`, ``(B, T)``; not together with a cache.
    """

    packing: Packing
    cache: RoutedCacheLayer | None
    branch: Tensor | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See :class:`Attention`; keys and values join the cache."""
        rows = self.packing.to_rows
        query, key, value = (rows(heads).transpose(1, 2) for heads in (query, key, value))
        mask = None
        if self.cache is not None:
            key, value, mask = self.cache.update(key, value, self.packing)
        batch, heads, length, width = query.shape
        if self.branch is not None:
            visible = branch_mask(self.packing.to_rows(self.packing.gather(self.branch)))
            mask = visible.tril().unsqueeze(1)
        if length == 1:
            # One query a sequence sees all its keys: the heads that share a key head are its queries.
            query = query.reshape(batch, key.shape[1], -1, width)
        output = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            is_causal=mask is None and length > 1,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return self.packing.from_rows(output.view(batch, heads, length, width).transpose(1, 2))


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise ValueError("routed attention runs inside a routed layer only: call the model, not its attention")


# Hugging Face's model makes no mask for an attention that it doesn't know: routed layers make their own.
ATTENTION = "routed"
AttentionInterface.register(ATTENTION, _refuse)
