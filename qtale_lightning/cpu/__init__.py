"""Operations that PyTorch has no fast form of on a CPU, in C++: of inference, see layer.h, attention.h, int4.h and
planes.h, and of rounding that is learned, see rounding.h.

They are an addition: where `ready` says no, callers take PyTorch's own operations. What a model computes is defined
there; here it is only computed in fewer passes over memory, with roundings at the same places.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qtale_lightning import precision
from qtale_lightning.cpu.build import available, instruction_set, operations

__all__ = [
    "attend_next",
    "available",
    "buffers",
    "decoder",
    "dense_linear",
    "few_tokens",
    "instruction_set",
    "int4_dequantize",
    "int4_linear",
    "int4_linear_rounded",
    "multiplies_in_tiles",
    "operations",
    "plane_dequantize",
    "plane_linear",
    "ready",
    "rms_norm",
    "rotate",
    "round_groups",
    "round_step",
    "route",
    "route_wide",
    "swiglu",
]

LANES = 16
"""Numbers that an operation takes at a time: widths are multiples of it."""

WIDEST_HEAD = 256
"""Of `attend_next`."""


def ready(x: Tensor, *others: Tensor) -> bool:
    """Whether these operations can take tensors: on the CPU, of one dtype (float32 or bfloat16), without gradients.

    Not while PyTorch compiles a model: it fuses its own operations by itself.
    """
    dtype = x.dtype
    for other in others:
        if other.dtype != dtype:
            return False
    return (
        (dtype == torch.bfloat16 or dtype == torch.float32)
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and available()
    )


@cache
def multiplies_in_tiles() -> bool:
    """Whether PyTorch multiplies bfloat16 by AMX here: many tokens at several times any other speed."""
    return precision.native_bfloat16() and bool(torch.cpu.get_capabilities().get("amx_bf16"))


@cache
def few_tokens(dtype: torch.dtype = torch.bfloat16) -> int:
    """Tokens up to which `dense_linear` takes less time than oneDNN or MKL, or about as much: benchmarks/dense.py.

    Theirs begins with putting the weight in order, and oneDNN's, for a number of tokens that is new, with milliseconds
    of generating code; without instructions for bfloat16 theirs is slow in it.
    """
    ours = instruction_set() or ""
    many = not multiplies_in_tiles() if dtype == torch.bfloat16 else ours.startswith("avx512")
    return 128 if many and available() else 16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Hugging Face's `LlamaRMSNorm`, ``(..., D)`` from ``(..., D)``; equal but for the order of the sum of squares."""
    return operations().rms_norm.default(x, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Hugging Face's rotary embedding of heads ``(B, T, H, d)`` by cosines and sines ``(1|B, T, d)``; equal."""
    return operations().rotate.default(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) · up`` of any shape; equal, but that exp may differ in its last bit."""
    return operations().swiglu.default(gate, up)


def attend_next(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: list[int],
    lengths: list[int],
    scaling: float,
) -> Tensor:
    """Attention of one new token a sequence to those kept of its sequence and to itself, ``(…, H, d)``.

    Args:
        query: ``(…, H, d)`` of N tokens or more: those behind the N-th repeat it.
        key, value: ``(…, H_kv, d)`` of as many; the first N are written into the buffers behind their sequence's last.
        keys, values: Buffers ``(B, H_kv, capacity, d)``.
        rows: Of the buffers, N different ones.
        lengths: Tokens kept of each of these.
        scaling: Of the scores.
    """
    return operations().attend_next.default(query, key, value, keys, values, rows, lengths, scaling)


def route(
    x: Tensor, down: Tensor, bias: Tensor, norm: Tensor, eps: float, out: Tensor, out_bias: Tensor
) -> Tensor:
    """A router's logits ``(N, 2)`` in float32, of a few tokens ``(N, D)``; its time grows with every token.

    Args:
        x: Contiguous, float32 or bfloat16.
        down: ``(W, D)``, float32 or bfloat16, and its ``bias (W,)``.
        norm: ``(W,)`` float32.
        out: ``(2, W)`` float32, and its bias ``out_bias (2,)``.
    """
    return operations().route.default(x, down, bias, norm, eps, out, out_bias)


def route_wide(wide: Tensor, norm: Tensor, eps: float, out: Tensor, out_bias: Tensor) -> Tensor:
    """`route` without its first product: float32 logits ``(N, 2)`` of ``wide (N, W)``, bias included, contiguous."""
    return operations().route_wide.default(wide, norm, eps, out, out_bias)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` of `few_tokens` ``(…, in)``: each weight comes from memory once."""
    return operations().dense_linear.default(x, weight, bias)


def buffers(keys: list[Tensor], values: list[Tensor]) -> Any:
    """A cache's buffers ``(B, H_kv, capacity, d)``, one of keys and one of values a layer, as a step takes them."""
    operations()
    return getattr(torch.classes, f"qtale_{instruction_set()}").Buffers(keys, values)


def decoder(
    heads: int, groups: int, width: int, scaling: float, eps: float, embeddings: Tensor, last_norm: Tensor
) -> Any:
    """A stack of decoder layers in C++, to which layers are added one by one, and a head at the end: see stack.h.

    Args:
        heads, groups: Of queries, and of keys and values; each is ``width`` wide.
        width: Of a head.
        scaling: Of the scores.
        eps: Of all norms.
        embeddings: ``(V, D)``, float32 or bfloat16, in which all is computed.
        last_norm: Weight ``(D,)`` of the norm behind the layers.
    """
    operations()
    library = getattr(torch.classes, f"qtale_{instruction_set()}")
    return library.Decoder(heads, groups, width, scaling, eps, embeddings, last_norm)


def int4_linear(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """``(…, out)`` from tokens ``(…, in)`` and a weight in the layout of int4.h; its time grows with every token.

    Args:
        x: Contiguous.
        packed: ``(out / 16, in / 8, 64)`` uint8.
        scales: ``(out / 16, groups, 16)`` float16.
        zeros: ``(out / 16, groups, 16)`` uint8.
    """
    return operations().int4_linear.default(x, packed, scales, zeros)


def int4_linear_rounded(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """`int4_linear` of tokens that are rounded to 8 bits, in blocks of 32 inputs, by integer products.

    A block's scale is its largest magnitude by 127. Sums within a block are exact. Groups are of a multiple of 32.
    """
    return operations().int4_linear_rounded.default(x, packed, scales, zeros)


def int4_dequantize(
    packed: Tensor, scales: Tensor, zeros: Tensor, first: int, count: int, like: Tensor
) -> Tensor:
    """The weight's outputs ``first`` to ``first + count``, ``(count, in)``, in the dtype of ``like``.

    Levels are ``(code - zero) · scale`` in float32, rounded once.
    """
    return operations().int4_dequantize.default(packed, scales, zeros, first, count, like)


def plane_linear(
    x: Tensor, high: Tensor, scales: Tensor, zeros: Tensor, bits: Sequence[Tensor] = ()
) -> Tensor:
    """``(…, out)`` from tokens ``(…, in)`` and a weight in planes, see planes.h; its time grows with every token.

    Args:
        x: Contiguous.
        high: Each code's highest 2 bits, ``(out / 16, in / 16, 64)`` uint8.
        scales, zeros: ``(out / 16, groups, 16)`` float16; of groups of a multiple of 32.
        bits: Planes of each further bit, the highest one first, ``(out / 16, in / 32, 64)`` uint8; 2 at most.
    """
    return operations().plane_linear.default(x, high, scales, zeros, bits)


def plane_dequantize(
    high: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: Sequence[Tensor],
    first: int,
    count: int,
    like: Tensor,
) -> Tensor:
    """`int4_dequantize` of a weight in planes."""
    return operations().plane_dequantize.default(high, scales, zeros, bits, first, count, like)


def round_groups(
    groups: Tensor, values: Tensor, scales: Tensor, zeros: Tensor, top: int, step: int, weight: Tensor
) -> None:
    """Writes (kept(clamp(round(w/s + v) + z, 0, top)) - z) · s into a weight ``(out, in)``, float32 or bfloat16.

    Args:
        groups, values: w and v, ``(out, n, g)``, float32; g is a multiple of `LANES`.
        scales, zeros: s and z, ``(out, n, 1)``, float32.
        step: A power of 2, of as many neighbouring codes kept gives the middle; 1 keeps all.
    """
    operations().round_groups.default(groups, values, scales, zeros, top, step, weight)


def round_step(
    groups: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor,
    top: int,
    step: int,
    gradient: Tensor,
    rate: float,
    reach: float,
) -> tuple[Tensor, Tensor]:
    """Moves v by `rate` against the sign of its gradient, within [-reach, reach], in place.

    Args:
        gradient: Of what `round_groups` writes, ``(out, in)``, float32 or bfloat16, contiguous.

    Returns:
        Sums over each group, ``(out, n, 1)``: of the gradients of weights that 0 or top holds, and that of s where z is
        constant.
    """
    return operations().round_step.default(groups, values, scales, zeros, top, step, gradient, rate, reach)
