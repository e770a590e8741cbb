"""Attention of a decoded token over a layer's cache, in Triton: rotation, appending and attention in one kernel.

How many keys there are is on the device, so that nobody waits for the host. Where a sequence skips the layer, nothing
is read, and nothing appended but where it keeps its key and value.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from qtale_lightning.cuda.arithmetic import dot, rounded_difference, rounded_product, rounded_sum

LEAST = 16
"""Queries that a tensor core takes: those of heads that share a key head, filled up."""


class Rotary(NamedTuple):
    """Cosines and sines of all positions, ``(positions, d)`` each, as Hugging Face's rotary embedding gives them."""

    cos: Tensor
    sin: Tensor


def attend(
    heads: Tensor,
    rotary: Rotary,
    positions: Tensor,
    head_norms: tuple[Tensor, Tensor] | None,
    eps: float,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    gates: Tensor,
    output: Tensor,
    scaling: float,
    keeps: bool = False,
) -> None:
    """Write the attention of one token a sequence into ``output (B, H · d)``; its key and value join the cache.

    Args:
        heads: Queries, keys and values side by side, ``(B, (H + 2 H_kv) · d)``, not rotated.
        rotary: Of all positions.
        positions: Of the tokens, int64 ``(B,)``.
        head_norms: Weights ``(d,)`` of the norms of queries and of keys.
        eps: Of these.
        keys, values: The layer's buffers ``(B, H_kv, capacity, d)``.
        lengths: Tokens in them, the new one counted, int32 ``(B,)``.
        gates: int32 ``(B,)``, 0 for a sequence that skips the layer.
        output: Of sequences that execute it.
        scaling: Of the scores.
        keeps: Whether keys and values join the cache of sequences that skip the layer, too.
    """
    batch, groups, capacity, width = keys.shape
    shared = output.shape[1] // width // groups
    query_norm, key_norm = (None, None) if head_norms is None else head_norms
    _attend[(batch, groups)](
        heads, *rotary, positions, query_norm, key_norm, eps, keys, values, lengths, gates, output, scaling, capacity,
        KEEPS=keeps, GROUPS=groups, SHARED=shared, WIDTH=width,
        QUERIES=max(LEAST, triton.next_power_of_2(shared)), BLOCK=64,
    )  # fmt: skip


@triton.jit
def _rotated(
    at: tl.tensor,
    mask: tl.tensor,
    norm: tl.tensor,
    eps: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Both halves of heads ``(N, d)``, normalised where there is a norm and rotated, with the model's roundings."""
    half: tl.constexpr = WIDTH // 2
    column = tl.arange(0, half)[None, :]
    low = tl.load(at + column, mask=mask, other=0.0)
    high = tl.load(at + half + column, mask=mask, other=0.0)
    if norm is not None:
        low_, high_ = low.to(tl.float32), high.to(tl.float32)
        factor = tl.rsqrt((tl.sum(low_ * low_, 1) + tl.sum(high_ * high_, 1)) / WIDTH + eps)[:, None]
        low = rounded_product((low_ * factor).to(low.dtype), tl.load(norm + column))
        high = rounded_product((high_ * factor).to(high.dtype), tl.load(norm + half + column))
    cos_low, cos_high = tl.load(cos + column), tl.load(cos + half + column)
    sin_low, sin_high = tl.load(sin + column), tl.load(sin + half + column)
    turned = rounded_difference(rounded_product(low, cos_low), rounded_product(high, sin_low))
    return turned, rounded_sum(rounded_product(high, cos_high), rounded_product(low, sin_high))


@triton.jit
def _attend(
    heads: tl.tensor, cos: tl.tensor, sin: tl.tensor, positions: tl.tensor, query_norm: tl.tensor, key_norm:
    tl.tensor, eps: tl.tensor, keys: tl.tensor, values: tl.tensor, lengths: tl.tensor, gates: tl.tensor, output:
    tl.tensor, scaling: tl.tensor, capacity: tl.tensor, KEEPS: tl.constexpr, GROUPS: tl.constexpr, SHARED: tl.constexpr,
    WIDTH: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """A program a sequence and key head."""
    row, group = tl.program_id(0), tl.program_id(1)
    if not KEEPS:  # noqa: SIM102 (known when it is compiled)
        if tl.load(gates + row) == 0:
            return
    half: tl.constexpr = WIDTH // 2
    past = tl.load(lengths + row) - 1
    place = tl.load(positions + row) * WIDTH
    cos, sin = cos + place, sin + place
    heads += row * (SHARED + 2) * GROUPS * WIDTH
    first = heads + (GROUPS * SHARED + group) * WIDTH + tl.arange(0, 1)[:, None]
    key_low, key_high = _rotated(first, True, key_norm, eps, cos, sin, WIDTH)
    column = tl.arange(0, WIDTH)[None, :]
    value = tl.load(first + GROUPS * WIDTH + column)
    buffer = (row * GROUPS + group).to(tl.int64) * capacity * WIDTH
    keys, values = keys + buffer, values + buffer
    halves = tl.arange(0, half)[None, :]
    tl.store(keys + past * WIDTH + halves, key_low)
    tl.store(keys + past * WIDTH + half + halves, key_high)
    tl.store(values + past * WIDTH + column, value)
    if KEEPS:  # noqa: SIM102
        if tl.load(gates + row) == 0:
            return

    query = tl.arange(0, QUERIES)[:, None]
    of_group = query < SHARED
    low, high = _rotated(heads + (group * SHARED + query) * WIDTH, of_group, query_norm, eps, cos, sin, WIDTH)
    # The new token first, from registers; then those of the cache, a block at a time, as flash attention does.
    low_, high_ = low.to(tl.float32), high.to(tl.float32)
    most = tl.sum(low_ * key_low.to(tl.float32), 1) + tl.sum(high_ * key_high.to(tl.float32), 1)
    most = (most * scaling)[:, None]
    total = tl.full((QUERIES, 1), 1.0, tl.float32)
    sums = tl.zeros((QUERIES, WIDTH), tl.float32) + value.to(tl.float32)
    for start in range(0, past, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        used = slot < past
        at = keys + slot[:, None] * WIDTH
        old_low = tl.load(at + halves, mask=used[:, None], other=0.0)
        old_high = tl.load(at + half + halves, mask=used[:, None], other=0.0)
        scores = dot(low, tl.trans(old_low), tl.zeros((QUERIES, BLOCK), tl.float32))
        scores = dot(high, tl.trans(old_high), scores) * scaling
        scores = tl.where(used[None, :], scores, float("-inf"))
        larger = tl.maximum(most, tl.max(scores, 1)[:, None])
        shrunk, weights = tl.exp(most - larger), tl.exp(scores - larger)
        old = tl.load(values + slot[:, None] * WIDTH + column, mask=used[:, None], other=0.0)
        sums = dot(weights.to(old.dtype), old, sums * shrunk)
        total = total * shrunk + tl.sum(weights, 1)[:, None]
        most = larger
    at = output + row * GROUPS * SHARED * WIDTH + (group * SHARED + query) * WIDTH + column
    tl.store(at, (sums / total).to(output.dtype.element_ty), mask=of_group)
