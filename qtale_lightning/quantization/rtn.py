"""Round-to-nearest quantization of weights, in groups along the input dimension.

The arithmetic is that of AutoAWQ's `pseudo_quantize_tensor`, so both give the same numbers. Asymmetric:

    scale = max(max(w) - min(w), 1e-5) / (2^bits - 1)
    zero  = clamp(-round(min(w) / scale), 0, 2^bits - 1)
    code  = clamp(round(w / scale) + zero, 0, 2^bits - 1)
    Q(w)  = (code - zero) * scale

Symmetric: scale = max(max|w|, 1e-5) / (2^(bits-1) - 1), and zero = 2^(bits-1).

Levels always reach zero: a group whose weights all have one sign is clipped, as in AutoAWQ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # what is planned and checked doesn't wait for it
    from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8
# Sizes that an error message may suggest, the field's usual ones first.
COMMON_GROUP_SIZES = (128, 64, 32, 16, 8)


@dataclass(frozen=True)
class Scheme:
    """How weights become codes.

    Attributes:
        bits: of a code, 2 to 8.
        group_size: inputs that share a scale and a zero point.
        symmetric: levels lie symmetrically around zero, instead of between a group's smallest and largest weight.
    """

    bits: int
    group_size: int
    symmetric: bool = False


class Quantized(NamedTuple):
    """Codes, shape `(..., in / group_size, group_size)`; scales and zero points, `(..., in / group_size, 1)`.

    All are float32; codes and zero points are whole numbers, 0..2^bits - 1.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def dequantize(self) -> Tensor:
        """The values that the codes stand for, shape `(..., in)`, float32."""
        return (self.codes - self.zeros).mul_(self.scales).flatten(-2)


def check_quantizable(shapes: Mapping[str, tuple[int, int]], bits: int, group_size: int) -> None:
    """Checks that every weight can be quantized at `bits` in groups of `group_size`, before any compute.

    Args:
        shapes: weight shape `(out, in)` by module name.

    Raises:
        ValueError: `bits` is not in 2..8, or `group_size` doesn't divide a weight's input width.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits must be from {MIN_BITS} to {MAX_BITS}, got {bits}")
    if group_size < 1:
        raise ValueError(f"group_size must be positive, got {group_size}")
    for name, (_, width) in shapes.items():
        if width % group_size:
            common = math.gcd(*(width for _, width in shapes.values()))
            fitting = [size for size in COMMON_GROUP_SIZES if common % size == 0] or [common]
            raise ValueError(
                f"group_size {group_size} doesn't divide the input width {width} of {name}: "
                f"choose one that divides every quantized width, such as {' or '.join(map(str, fitting))}"
            )


def quantize(weight: Tensor, scheme: Scheme) -> Quantized:
    """Rounds weights, shape `(..., in)`, to the nearest of 2^bits levels; each group has its own levels.

    Computed in float32. `in` must be a multiple of the group size.
    """
    groups = weight.float().unflatten(-1, (-1, scheme.group_size))
    max_code = 2**scheme.bits - 1
    low, high = groups.aminmax(dim=-1, keepdim=True)
    if scheme.symmetric:
        middle = 2 ** (scheme.bits - 1)
        scales = low.abs().maximum(high.abs()).clamp_(min=1e-5).div_(middle - 1)
        zeros = scales.new_full(scales.shape, middle)
    else:
        scales = (high - low).clamp_(min=1e-5).div_(max_code)
        zeros = (low / scales).round_().neg_().clamp_(0, max_code)
    codes = (groups / scales).round_().add_(zeros).clamp_(0, max_code)
    return Quantized(codes, scales, zeros)


def fake_quantize(weight: Tensor, scheme: Scheme) -> Tensor:
    """Quantizes and dequantizes: the values that a quantized weight stands for.

    Args:
        weight: shape `(..., in)`, usually `(out, in)`; computed in float32.

    Returns:
        A new tensor of the same shape and dtype.
    """
    codes, scales, zeros = quantize(weight, scheme)
    return codes.sub_(zeros).mul_(scales).flatten(-2).to(weight.dtype)
