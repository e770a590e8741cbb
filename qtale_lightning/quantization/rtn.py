"""Asymmetric round-to-nearest quantization of weights, in groups along the input dimension.

The arithmetic is that of AutoAWQ's `pseudo_quantize_tensor` with a zero point, so both give the same numbers:

    scale = max(max(w) - min(w), 1e-5) / (2^bits - 1)
    zero  = clamp(-round(min(w) / scale), 0, 2^bits - 1)
    code  = clamp(round(w / scale) + zero, 0, 2^bits - 1)
    Q(w)  = (code - zero) * scale

Levels always reach zero: a group whose weights all have one sign is clipped, as in AutoAWQ.
"""

import math
from collections.abc import Mapping

from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8
# Sizes that an error message may suggest, the field's usual ones first.
COMMON_GROUP_SIZES = (128, 64, 32, 16, 8)


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


def quantize(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds weights to the nearest of 2^bits levels; each group of `group_size` inputs has its own levels.

    Args:
        weight: shape `(..., in)`; computed in float32. `in` must be a multiple of `group_size`.

    Returns:
        codes, shape `(..., in / group_size, group_size)`; scales and zero points, both of shape
        `(..., in / group_size, 1)`. All are float32; codes and zero points are whole numbers, 0..2^bits - 1.
    """
    groups = weight.float().unflatten(-1, (-1, group_size))
    max_code = 2**bits - 1
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scales = (high - low).clamp_(min=1e-5).div_(max_code)
    zeros = (low / scales).round_().neg_().clamp_(0, max_code)
    codes = (groups / scales).round_().add_(zeros).clamp_(0, max_code)
    return codes, scales, zeros


def fake_quantize(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Quantizes and dequantizes: the weights that a `bits`-bit model computes with.

    Args:
        weight: shape `(..., in)`, usually `(out, in)`; computed in float32.

    Returns:
        A new tensor of the same shape and dtype.
    """
    codes, scales, zeros = quantize(weight, bits, group_size)
    return codes.sub_(zeros).mul_(scales).flatten(-2).to(weight.dtype)
