"""Products of a decoded token with a layer's weights, in Triton: where no sequence executes the layer they read none.

A program makes some outputs of all sequences of a batch, so that a weight is read once. The RMS norm in front of a
block is part of its first product, and the residual stream of its last one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtale_lightning.cuda.arithmetic import INTERPRETED, dot, rounded_product

MOST_SEQUENCES = 16
"""Of a batch: what a tensor core multiplies at a time."""

GROUP_SIZES = (32, 64, 128, 256)
"""Inputs that share a scale, of int4 weights."""


class Weight(NamedTuple):
    """What a linear multiplies with.

    Attributes:
        values: ``(out, in)``; or of int4 ``(out, in / 2)`` uint8, the first of two inputs in the lower half.
        scales: Of int4, float16 ``(out, groups)``.
        zeros: Of int4, uint8 ``(out, groups)``.
        bias: ``(out,)``.
    """

    values: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    bias: Tensor | None = None

    @property
    def inputs(self) -> int:
        """Of a token."""
        return self.values.shape[1] * (1 if self.scales is None else 2)

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; 0 of a dense weight."""
        return 0 if self.scales is None else self.inputs // self.scales.shape[1]

    @property
    def form(self) -> tuple[int, bool]:
        """What weights of one kernel have in common."""
        return self.group_size, self.bias is None


def padded(batch: int) -> int:
    """Sequences that a program computes: one alone, or what a tensor core takes."""
    return 1 if batch == 1 else MOST_SEQUENCES


def linear(
    x: Tensor,
    weights: Sequence[Weight],
    y: Tensor,
    gates: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: bool = False,
    first: int = 0,
) -> None:
    """Write ``x · Wᵀ + b`` of up to three weights, side by side, into ``y (B, Σ out)``, rounded to its dtype.

    Args:
        x: Tokens ``(B, in)``, contiguous.
        weights: Of the same inputs.
        y: Contiguous; rows of closed sequences may be written, too, unless they are a residual stream.
        gates: int32 ``(B,)``, 0 for a sequence that skips the layer; None: all execute.
        norm: Weight ``(in,)`` of an RMS norm that tokens go through before; Hugging Face's, with its roundings.
        eps: Of the norm.
        residual: Add to ``y``, in sequences that execute the layer, instead.
        first: Of the outputs ``y`` has: where these begin.
    """
    if len({weight.form for weight in weights}) > 1:
        for weight in weights:
            _launch(x, [weight], y, first, gates, norm, eps, residual)
            first += len(weight.values)
    else:
        _launch(x, weights, y, first, gates, norm, eps, residual)


def _launch(
    x: Tensor, weights: Sequence[Weight], y: Tensor, first: int, gates: Tensor | None, norm: Tensor | None, eps: float,
    residual: bool,
) -> None:  # fmt: skip
    """:func:`linear` of weights of one form, whose outputs begin at ``first``."""
    rows, block = _tile(weights[0], len(x))
    outputs = [len(weight.values) for weight in weights] + [0] * (3 - len(weights))
    three = [*weights, *[weights[0]] * (3 - len(weights))]
    _linear[(sum(triton.cdiv(count, rows) for count in outputs),)](
        x, norm, eps, gates, y, *(part for weight in three for part in weight), *outputs, first,
        INPUTS=x.shape[1], OUTPUTS=y.shape[1], BATCH=len(x), TOKENS=padded(len(x)), ROWS=rows, BLOCK=block,
        GROUP=weights[0].group_size, RESIDUAL=residual,
    )  # fmt: skip


def gated_linear(
    x: Tensor, gate: Weight, up: Weight, y: Tensor, gates: Tensor, norm: Tensor, eps: float
) -> None:
    """Write ``silu(gate(x)) · up(x)`` of normalised tokens ``x (B, in)`` into ``y (B, out)``; see :func:`linear`."""
    rows, block = _tile(gate, len(x))
    _gated_linear[(triton.cdiv(y.shape[1], rows),)](
        x, norm, eps, gates, y, *gate, *up, gate.group_size, up.group_size,
        INPUTS=x.shape[1], OUTPUTS=y.shape[1], BATCH=len(x), TOKENS=padded(len(x)), ROWS=rows, BLOCK=block,
    )  # fmt: skip


def dequantize(weight: Weight, y: Tensor) -> None:
    """Write the levels of an int4 weight into ``y (out, in)``, rounded once."""
    outputs, inputs = y.shape
    grid = triton.cdiv(outputs, 16), triton.cdiv(inputs // 2, 128)
    _dequantize[grid](
        weight.values, weight.scales, weight.zeros, y, outputs, inputs, weight.group_size, ROWS=16, BLOCK=128
    )


def _tile(weight: Weight, batch: int) -> tuple[int, int]:
    """Outputs of a program, and inputs that it multiplies at a time, of a dense weight."""
    if INTERPRETED:  # where every program takes as long
        return 128, 128
    if batch > 1:  # what tensor cores take, with programs enough for all processors at 4,096 outputs
        return 32, 64
    return (16, 256) if weight.values.element_size() < 4 else (16, 128)


# ---------------------------------------------------------------------------------------------------- kernels


@triton.jit
def open_tokens(gates: tl.tensor, BATCH: tl.constexpr, TOKENS: tl.constexpr) -> tl.tensor:
    """Whether each of a program's sequences executes the layer, int1 ``(TOKENS,)``."""
    token = tl.arange(0, TOKENS)
    is_open = token < BATCH
    if gates is not None:
        is_open = tl.load(gates + token, mask=is_open, other=0) != 0
    return is_open


@triton.jit
def norm_factor(
    x: tl.tensor,
    eps: tl.tensor,
    INPUTS: tl.constexpr,
    BATCH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """1 / √(mean(x²) + eps), float32 ``(TOKENS,)``."""
    token = tl.arange(0, TOKENS)[:, None]
    squares = tl.zeros((TOKENS, BLOCK), tl.float32)
    for start in range(0, INPUTS, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        value = tl.load(x + token * INPUTS + column, mask=(token < BATCH) & (column < INPUTS), other=0.0)
        squares += value.to(tl.float32) * value.to(tl.float32)
    return tl.rsqrt(tl.sum(squares, 1) / INPUTS + eps)


@triton.jit
def _tokens(
    x: tl.tensor,
    norm: tl.tensor,
    factor: tl.tensor,
    column: tl.tensor,
    INPUTS: tl.constexpr,
    BATCH: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tensor:
    """Some inputs of all tokens, normalised where there is a norm, ``(TOKENS, columns)``."""
    token, column = tl.arange(0, TOKENS)[:, None], column[None, :]
    value = tl.load(x + token * INPUTS + column, mask=(token < BATCH) & (column < INPUTS), other=0.0)
    if norm is not None:
        weight = tl.load(norm + column, mask=column < INPUTS, other=0.0)
        value = rounded_product(weight, (value.to(tl.float32) * factor[:, None]).to(value.dtype))
    return value


@triton.jit
def _dense_rows(
    x: tl.tensor, norm: tl.tensor, factor: tl.tensor, weight: tl.tensor, row: tl.tensor, outputs: tl.tensor,
    INPUTS: tl.constexpr, BATCH: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Products of some rows of a dense weight, float32 ``(ROWS, TOKENS)``."""
    at = weight + row.to(tl.int64)[:, None] * INPUTS
    sums = tl.zeros((ROWS, BLOCK if TOKENS == 1 else TOKENS), tl.float32)
    for start in range(0, INPUTS, BLOCK):
        column = start + tl.arange(0, BLOCK)
        token = _tokens(x, norm, factor, column, INPUTS, BATCH, TOKENS)
        inside = (row < outputs)[:, None] & (column < INPUTS)[None, :]
        value = tl.load(at + column[None, :], mask=inside, other=0.0)
        if TOKENS == 1:
            sums += value.to(tl.float32) * token.to(tl.float32)
        else:
            sums = dot(value, tl.trans(token.to(value.dtype)), sums)
    return tl.sum(sums, 1)[:, None] if TOKENS == 1 else sums


@triton.jit
def _level(codes: tl.tensor) -> tl.tensor:
    """Whole numbers 0 to 15 as float32, plus 2²³: by their bits, since converting them costs four times as much."""
    return (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _int4_rows(
    x: tl.tensor, norm: tl.tensor, factor: tl.tensor, weight: tl.tensor, scales: tl.tensor, zeros: tl.tensor, row:
    tl.tensor, outputs: tl.tensor, INPUTS: tl.constexpr, BATCH: tl.constexpr, TOKENS: tl.constexpr, ROWS:
    tl.constexpr, GROUP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Products of some rows of an int4 weight, a group of inputs at a time, float32 ``(ROWS, TOKENS)``."""
    groups: tl.constexpr = INPUTS // GROUP
    half: tl.constexpr = GROUP // 2
    at, place = row.to(tl.int64)[:, None] * (INPUTS // 2), row * groups
    byte = tl.arange(0, half)
    inside = row < outputs
    sums = tl.zeros((ROWS, half if TOKENS == 1 else TOKENS), tl.float32)
    for group in tl.range(0, groups, loop_unroll_factor=4 if TOKENS == 1 else 1):
        codes = tl.load(weight + at + group * half + byte[None, :], mask=inside[:, None], other=0)
        scale = tl.load(scales + place + group, mask=inside, other=0.0).to(tl.float32)[:, None]
        zero = _level(tl.load(zeros + place + group, mask=inside, other=0))[:, None]
        even = _tokens(x, norm, factor, group * GROUP + 2 * byte, INPUTS, BATCH, TOKENS)
        odd = _tokens(x, norm, factor, group * GROUP + 2 * byte + 1, INPUTS, BATCH, TOKENS)
        low, high = _level(codes & 15) - zero, _level(codes >> 4) - zero
        if TOKENS == 1:
            sums += scale * (low * even.to(tl.float32) + high * odd.to(tl.float32))
        else:  # codes less zero points are exact in any dtype
            part = dot(low.to(even.dtype), tl.trans(even), tl.zeros((ROWS, TOKENS), tl.float32))
            sums += scale * dot(high.to(odd.dtype), tl.trans(odd), part)
    return tl.sum(sums, 1)[:, None] if TOKENS == 1 else sums


@triton.jit
def _rows(
    x: tl.tensor, norm: tl.tensor, factor: tl.tensor, weight: tl.tensor, scales: tl.tensor, zeros: tl.tensor, bias:
    tl.tensor, row: tl.tensor, outputs: tl.tensor, INPUTS: tl.constexpr, BATCH: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Products of some rows of a weight, with its bias, float32 ``(ROWS, TOKENS)``."""
    if GROUP == 0:
        product = _dense_rows(x, norm, factor, weight, row, outputs, INPUTS, BATCH, TOKENS, ROWS, BLOCK)
    else:
        product = _int4_rows(
            x, norm, factor, weight, scales, zeros, row, outputs, INPUTS, BATCH, TOKENS, ROWS, GROUP
        )
    if bias is not None:
        product += tl.load(bias + row, mask=row < outputs, other=0.0).to(tl.float32)[:, None]
    return product


@triton.jit
def _linear(
    x: tl.tensor, norm: tl.tensor, eps: tl.tensor, gates: tl.tensor, y: tl.tensor,
    w0: tl.tensor, s0: tl.tensor, z0: tl.tensor, b0: tl.tensor,
    w1: tl.tensor, s1: tl.tensor, z1: tl.tensor, b1: tl.tensor,
    w2: tl.tensor, s2: tl.tensor, z2: tl.tensor, b2: tl.tensor,
    n0: tl.tensor, n1: tl.tensor, n2: tl.tensor, first: tl.tensor,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BATCH: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, RESIDUAL: tl.constexpr,
) -> None:  # fmt: skip
    """Each program has a block of rows of one of the weights."""
    is_open = open_tokens(gates, BATCH, TOKENS)
    if tl.max(is_open.to(tl.int32), 0) == 0:
        return
    block, second = tl.program_id(0), tl.cdiv(n0, ROWS)
    third = second + tl.cdiv(n1, ROWS)
    is_second, is_third = block >= second, block >= third
    weight = tl.where(is_third, w2, tl.where(is_second, w1, w0))
    scales, zeros, bias = s0, z0, b0
    if GROUP > 0:
        scales = tl.where(is_third, s2, tl.where(is_second, s1, s0))
        zeros = tl.where(is_third, z2, tl.where(is_second, z1, z0))
    if b0 is not None:
        bias = tl.where(is_third, b2, tl.where(is_second, b1, b0))
    outputs = tl.where(is_third, n2, tl.where(is_second, n1, n0))
    first += tl.where(is_third, n0 + n1, tl.where(is_second, n0, 0))
    block -= tl.where(is_third, third, tl.where(is_second, second, 0))

    factor = norm_factor(x, eps, INPUTS, BATCH, TOKENS, BLOCK) if norm is not None else eps
    row = block * ROWS + tl.arange(0, ROWS)
    product = _rows(
        x, norm, factor, weight, scales, zeros, bias, row, outputs, INPUTS, BATCH, TOKENS, ROWS, BLOCK, GROUP
    )
    place = y + tl.arange(0, TOKENS)[None, :] * OUTPUTS + first + row[:, None]
    inside = is_open[None, :] & (row < outputs)[:, None]
    dtype = y.dtype.element_ty
    if RESIDUAL:
        stream = tl.load(place, mask=inside, other=0.0)
        product = stream.to(tl.float32) + product.to(dtype).to(tl.float32)
    tl.store(place, product.to(dtype), mask=inside)


@triton.jit
def _gated_linear(
    x: tl.tensor, norm: tl.tensor, eps: tl.tensor, gates: tl.tensor, y: tl.tensor,
    w0: tl.tensor, s0: tl.tensor, z0: tl.tensor, b0: tl.tensor, w1: tl.tensor, s1: tl.tensor, z1: tl.tensor, b1:
    tl.tensor, G0: tl.constexpr, G1: tl.constexpr, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BATCH: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Each program has a block of rows of both weights; they round where Hugging Face's operations do."""
    is_open = open_tokens(gates, BATCH, TOKENS)
    if tl.max(is_open.to(tl.int32), 0) == 0:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    factor = norm_factor(x, eps, INPUTS, BATCH, TOKENS, BLOCK)
    gate = _rows(x, norm, factor, w0, s0, z0, b0, row, OUTPUTS, INPUTS, BATCH, TOKENS, ROWS, BLOCK, G0)
    up = _rows(x, norm, factor, w1, s1, z1, b1, row, OUTPUTS, INPUTS, BATCH, TOKENS, ROWS, BLOCK, G1)
    dtype = y.dtype.element_ty
    gate = gate.to(dtype).to(tl.float32)
    product = rounded_product((gate / (1 + tl.exp(-gate))).to(dtype), up.to(dtype))
    place = y + tl.arange(0, TOKENS)[None, :] * OUTPUTS + row[:, None]
    tl.store(place, product, mask=is_open[None, :] & (row < OUTPUTS)[:, None])


@triton.jit
def _dequantize(
    weight: tl.tensor, scales: tl.tensor, zeros: tl.tensor, y: tl.tensor, outputs: tl.tensor,
    INPUTS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """A program has a block of rows and inputs."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < outputs) & (byte < INPUTS // 2)
    codes = tl.load(weight + row * (INPUTS // 2) + byte, mask=inside, other=0)
    group = row * (INPUTS // GROUP) + 2 * byte // GROUP
    scale = tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)
    zero = _level(tl.load(zeros + group, mask=inside, other=0))
    levels = tl.interleave((_level(codes & 15) - zero) * scale, (_level(codes >> 4) - zero) * scale)
    column = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)[None, :]
    tl.store(
        y + row * INPUTS + column, levels.to(y.dtype.element_ty), mask=(row < outputs) & (column < INPUTS)
    )


def from_codes(codes: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None = None) -> Weight:
    """An int4 weight of codes 0 to 15, scales and zero points as `quantization.rtn.Quantized` has them.

    ``codes (out, groups, group)``, the others ``(out, groups, 1)``.
    """
    flat = codes.flatten(1).to(torch.uint8)
    packed = (flat[:, ::2] | flat[:, 1::2] << 4).contiguous()
    return Weight(
        packed, scales.squeeze(-1).half().contiguous(), zeros.squeeze(-1).to(torch.uint8).contiguous(), bias
    )
