"""Attention of a routed layer, in its two executions: among all tokens with evicted keys, or among executing ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from qtale_lightning import cpu
from qtale_lightning.compat import kernels
from qtale_lightning.models.cache import RoutedCacheLayer
from qtale_lightning.models.packing import Packing, Reach, Subset, rows_of

# Tokens of a sequence, on average, from which sequences attend one after the other on a CPU.
MANY_TOKENS = 16


class Attention(Protocol):
    """One layer's attention, ``(B, T, H, d)``, from query ``(B, T, H, d)`` and key, value ``(B, T, H_kv, d)``."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float
    ) -> Tensor: ...

    def asked(self, x: Tensor) -> Tensor:
        """Those of the tokens ``(B, T, …)`` whose output is asked for: the queries."""


def by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    scaling: float,
    gate: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention ``(B, H, T, d)`` as matrix products with a softmax in float32, from key and value ``(B, H_kv, S, d)``.

    Args:
        query: ``(B, H, T, d)``.
        bias: Added to the scores, broadcast to ``(B, H, T, S)``.
        gate: Of keys, ``(B, S)``; see :class:`Masked`.
    """
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1:3]
    # The query heads that share a key head are stacked into one matrix product, instead of repeating the keys.
    scores = query.reshape(batch, groups, -1, width) @ key.transpose(2, 3)
    scores = scores.view(batch, heads, length, keys) * scaling + bias
    probabilities = scores.softmax(-1, dtype=torch.float32)
    if gate is not None:
        probabilities = probabilities * gate[:, None, None, :].float()
        # A padding query may have no open key at all: 0 / tiny = 0 instead of NaN.
        probabilities = probabilities / probabilities.sum(-1, keepdim=True).clamp_min(1e-30)
    probabilities = nn.functional.dropout(probabilities.to(value.dtype), dropout)
    output = probabilities.view(batch, groups, -1, keys) @ value
    return output.view(batch, heads, length, width)


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
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return by_products(query, key, value, self.bias, scaling, self.gate, dropout).transpose(1, 2)

    def asked(self, x: Tensor) -> Tensor:
        """All of them."""
        return x


@dataclass(frozen=True)
class Packed:
    """Causally among executing tokens, flat ``(1, N)`` in and out.

    Attributes:
        packing: How they were gathered.
        cache: The layer's.
        queries: Which executing tokens are asked for; None: all.
        visible: Which keys the queries may see, bool ``(B, 1, L', L)``; None: all before them. Not with a cache.
        reach: How far back the queries may see; None: to the beginning.
    """

    packing: Packing
    cache: RoutedCacheLayer | None
    queries: Subset | None = None
    visible: Tensor | None = None
    reach: Reach | None = None

    def asked(self, x: Tensor) -> Tensor:
        """Of flat tokens ``(1, N, …)``."""
        return x if self.queries is None else self.queries.select(x)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """See :class:`Attention`; keys and values join the cache."""
        if self.cache is not None and self.reach is not None:
            self.cache.remember(self.reach.places, self.packing)
        if self._attends_next(query, key, value):
            assert self.cache is not None
            return self.cache.attend_next(query, key, value, self.packing, scaling)
        if self._attends_flat(key):
            return self._flat(query, key, value, scaling)
        queries = self.packing if self.queries is None else self.queries.packing
        query = queries.to_rows(query).transpose(1, 2)
        key, value = (self.packing.to_rows(heads).transpose(1, 2) for heads in (key, value))
        mask = None
        if self.cache is not None:
            key, value, mask = self.cache.update(key, value, self.packing)
        batch, heads, length, width = query.shape
        if self.queries is not None:
            mask = self.queries.mask(
                self.cache.past(self.packing) if self.cache is not None else None, key.shape[2]
            )
        if self._is_bounded:
            assert self.reach is not None
            packed = rows_of(self.reach.places, self.packing) if self.cache is None else self.cache.recall()
            mask = self.reach.mask(queries, packed)
        if self.visible is not None:
            mask = self.visible if mask is None else self.visible & mask
        if key.requires_grad and key.is_cpu and key.dtype == torch.bfloat16:
            # The backward of PyTorch's takes four times as long there (of 8 × 40 tokens, 9 heads of 64).
            bias = self._bias(mask, length, key)
            output = by_products(query, key, value, bias, scaling)
            return queries.from_rows(output.transpose(1, 2))
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
        return queries.from_rows(output.view(batch, heads, length, width).transpose(1, 2))

    @staticmethod
    def _bias(mask: Tensor | None, length: int, key: Tensor) -> Tensor:
        """0 where a key is seen, and else the lowest number: in a row of padding, which sees none, nothing is NaN."""
        seen = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
        return key.new_zeros(seen.shape).masked_fill_(~seen, torch.finfo(key.dtype).min)

    def leave(self, key: Tensor, value: Tensor) -> None:
        """Keys and values ``(1, N, H_kv, d)`` join the cache, and nobody asks for anything."""
        assert self.cache is not None
        if self.reach is not None:
            self.cache.remember(self.reach.places, self.packing)
        rows = self.packing.to_rows
        self.cache.update(rows(key).transpose(1, 2), rows(value).transpose(1, 2), self.packing)

    @property
    def _is_bounded(self) -> bool:
        """Whether some query can't see the beginning of its sequence."""
        return self.reach is not None and self.reach.binds

    def _attends_next(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether this is decoding, a token a sequence at most, where the CPU's operation takes it."""
        alone = self.packing.length == 1 and self.queries is None and self.visible is None
        alone = alone and not self._is_bounded
        fits = query.shape[-1] % cpu.LANES == 0 and query.shape[-1] <= cpu.WIDEST_HEAD
        return self.cache is not None and alone and fits and cpu.ready(query, key, value)

    def _attends_flat(self, key: Tensor) -> bool:
        """Whether sequences of a prompt attend without rows, whose padding and copies that saves.

        On a GPU that needs a kernel, made for half precision; on a CPU it pays where sequences are long enough.
        """
        ragged = self.packing.index is not None and self.queries is None and self.visible is None
        if not ragged or self._is_bounded or (self.cache is not None and self.cache.longest):
            return False
        if key.is_cuda:
            return kernels.takes_variable_lengths(key)
        if key.requires_grad:  # whose backward costs as much for one sequence as for all
            return False
        return key.is_cpu and sum(self.packing.counts) >= MANY_TOKENS * len(self.packing.counts)

    def _flat(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Causal attention within each sequence of flat tokens; their keys and values begin the cache."""
        if self.cache is not None:
            rows = self.packing.to_rows
            self.cache.update(rows(key).transpose(1, 2), rows(value).transpose(1, 2), self.packing)
        counts, count = self.packing.counts, query.shape[1]
        query, key, value = (tokens[0, : sum(counts)] for tokens in (query, key, value))  # (N, H, d)
        if query.is_cuda:
            assert self.packing.ends is not None
            output = kernels.variable_length_attention(
                query, key, value, self.packing.ends, max(counts), scaling
            )
        else:
            output = _one_by_one(query, key, value, counts, scaling)
        # What the packing repeats is the last token.
        return torch.cat([output, output[-1:].expand(count - len(output), -1, -1)]).unsqueeze(0)


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, counts: Sequence[int], scaling: float) -> Tensor:
    """Causal attention of each sequence of ``(N, H, d)``, one after the other."""
    outputs = []
    for parts in zip(*(tokens.split(counts) for tokens in (query, key, value)), strict=True):
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in parts)
        if q.shape[2]:
            output = nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(output.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def routed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float | None = 0.0,
    attend: Attention | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a routed layer as transformers' `AttentionInterface` calls it, inside a family's own forward.

    Query ``(B, H, T, d)``, key and value ``(B, H_kv, T, d)`` give ``(B, T, H, d)``; ``attend`` is what the routed layer
    hands through. Masks and windows are its own.

    Raises:
        ValueError: It was called by anything else.
    """
    if attend is None:
        raise ValueError(
            "routed attention runs inside a routed layer only: call the model, not its attention"
        )
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    return attend(query, key, value, scaling, float(dropout or 0.0)), None


# Hugging Face's model makes no mask for an attention that it doesn't know: routed layers make their own.
ATTENTION = "routed"
AttentionInterface.register(ATTENTION, routed_attention)
