"""A layer's decision about a decoded token, in Triton: the router's last part and `Method.decide`, on the device.

It opens the layer's gate for the kernels behind it, and makes room in the layer's cache where a token executes it.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from qtale_lightning.cuda.linear import Weight, linear


class RouterWeights(NamedTuple):
    """Of a router, as `Router.operands` gives them.

    Attributes:
        down: ``(W, D)``, in the dtype that it multiplies in.
        bias: ``(W,)`` float32.
        norm: ``(W,)`` float32.
        eps: Of the norm.
        out: ``(2, W)`` float32.
        out_bias: ``(2,)`` float32.
    """

    down: Tensor
    bias: Tensor
    norm: Tensor
    eps: float
    out: Tensor
    out_bias: Tensor


class Decisions(NamedTuple):
    """Where a layer's decisions go, and what they go by; B sequences.

    Attributes:
        gates: int32 ``(B,)``: 1 for those that execute the layer.
        logits: float32 ``(B, 2)``.
        lengths: int32 ``(B,)``: tokens in the layer's cache, this one included where it executes, or is kept.
        threshold: θ, float32 ``(1,)``.
        places: Of the token in its sequence, int64 ``(B,)``.
        forced: Decisions that replace the router's, int8 ``(steps, B)``, -1 where there are none; repeated.
        step: Which of these it is, int64 ``(1,)``.
        keeps: Whether a token leaves a key and a value in a layer that it skips, too.
    """

    gates: Tensor
    logits: Tensor
    lengths: Tensor
    threshold: Tensor
    places: Tensor
    forced: Tensor | None
    step: Tensor
    keeps: bool


def decide(x: Tensor, router: RouterWeights, wide: Tensor, to: Decisions, reserved: int) -> None:
    """Decide about tokens ``x (B, D)``.

    Args:
        x: The raw residual stream.
        router: The layer's.
        wide: Room for its wide product, ``(B, W)`` in the dtype of its weight.
        to: What is written.
        reserved: Initial tokens of a sequence, which execute every layer.
    """
    linear(x, [Weight(router.down, bias=router.bias)], wide)
    forced, strides = to.forced, (0, 0) if to.forced is None else to.forced.stride()
    _decide[(len(x),)](
        wide, router.norm, router.eps, router.out, router.out_bias, to.threshold, forced, to.step, to.places,
        to.gates, to.logits, to.lengths,
        1 if forced is None else len(forced), *strides, reserved,
        KEEPS=to.keeps, WIDTH=wide.shape[1], BLOCK=triton.next_power_of_2(wide.shape[1]),
    )  # fmt: skip


def always(to: Decisions) -> None:
    """All execute the layer: one that isn't decided about."""
    to.gates.fill_(1)
    to.lengths.add_(1)


@triton.jit
def _decide(
    wide: tl.tensor, norm: tl.tensor, eps: tl.tensor, out: tl.tensor, out_bias: tl.tensor, threshold: tl.tensor,
    forced: tl.tensor, step: tl.tensor, places: tl.tensor, gates: tl.tensor, logits: tl.tensor, lengths: tl.tensor,
    steps: tl.tensor, step_stride: tl.tensor, forced_stride: tl.tensor, reserved: tl.tensor, KEEPS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """A program a sequence."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    hidden = tl.load(wide + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(hidden * hidden, 0) / WIDTH + eps)
    hidden = hidden * factor * tl.load(norm + column, mask=inside, other=0.0)
    hidden = hidden / (1 + tl.exp(-hidden))
    skip = tl.sum(hidden * tl.load(out + column, mask=inside, other=0.0), 0) + tl.load(out_bias)
    execute = tl.sum(hidden * tl.load(out + WIDTH + column, mask=inside, other=0.0), 0) + tl.load(
        out_bias + 1
    )
    most = tl.maximum(skip, execute)
    open_, closed = tl.exp(execute - most), tl.exp(skip - most)
    gate = (open_ / (open_ + closed) >= tl.load(threshold)).to(tl.int32)
    if forced is not None:
        given = tl.load(forced + (tl.load(step) % steps) * step_stride + row * forced_stride).to(tl.int32)
        gate = tl.where(given < 0, gate, given)
    gate = tl.where(tl.load(places + row) < reserved, 1, gate)
    tl.store(logits + 2 * row, skip)
    tl.store(logits + 2 * row + 1, execute)
    tl.store(gates + row, gate)
    tl.store(lengths + row, tl.load(lengths + row) + (1 if KEEPS else gate))
