"""Products with quantized weights: which kernel takes which, and the reference that dequantizes.

    y = x · Q(W)ᵀ,  Q(W) = (code - zero) · scale

A kernel is prepared once for a weight and a device, and keeps the weight in its own layout: `int4_cpu`, `int4_cuda`,
`planes`.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from qtale_lightning.quantization.int4 import are_whole, round_tokens
from qtale_lightning.quantization.int4_cpu import Int4CPU, Int4Strips
from qtale_lightning.quantization.int4_cuda import Int4CUDA, Int4Rows
from qtale_lightning.quantization.nested import narrowed
from qtale_lightning.quantization.planes import PlaneStrips
from qtale_lightning.quantization.rtn import Quantized


class Kernel(Protocol):
    """Multiplies tokens, shape `(..., in)`, with a quantized weight, to shape `(..., out)` in the tokens' dtype."""

    name: str

    def __call__(self, x: Tensor) -> Tensor: ...


class Dequantize:
    """The reference, for any width, shape, dtype and device: dequantizes the whole weight at every call.

    Holds one byte a code.
    """

    name = "dequantize at every call"

    def __init__(self, weight: Quantized) -> None:
        self.weight = Quantized(weight.codes.to(torch.uint8), weight.scales.float(), weight.zeros.float())

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.dequantize().to(x.dtype))


def rounded_product(kernel: Kernel, x: Tensor) -> Tensor:
    """A kernel's product of tokens rounded to 8 bits: by integers where it has them."""
    if isinstance(kernel, Int4Strips) and kernel.takes_rounded:
        return kernel.by_rounded(x)
    return kernel(round_tokens(x))


def choose_kernel(weight: Quantized, rounded: bool = False) -> Kernel:
    """The fastest kernel that takes a weight where it lies, for tokens as they are or `rounded` to 8 bits."""
    # Of 3 bits a plane of single bits takes more time than int4's further one: benchmarks/planes.py.
    few = bool(weight.codes.max() < 4) and not (rounded and are_whole(weight.zeros))
    if (few or not are_whole(weight.zeros)) and PlaneStrips.supports(weight):
        return PlaneStrips(weight)
    for kernel in (Int4Strips, Int4CPU, Int4Rows, Int4CUDA):
        if kernel.supports(weight):
            return kernel(weight)
    return Dequantize(weight)


def kernels_for(
    weight: Quantized, bits: int, narrower: Mapping[int, tuple[Tensor, Tensor]], rounded: bool = False
) -> dict[int, Kernel]:
    """Kernels for a weight's codes, and for their highest bits, by width.

    Where our operations for the CPU take it, their codes share memory.

    Args:
        bits: of the codes.
        narrower: by fewer bits, the scales and zero points of these, `(out, in / group_size)`.
    """
    if not narrower:
        return {bits: choose_kernel(weight, rounded)}
    if PlaneStrips.supports(weight):
        planes = PlaneStrips(weight, bits)
        return {bits: planes, **{width: planes.at(width, *terms) for width, terms in narrower.items()}}
    found = {bits: choose_kernel(weight, rounded)}
    for width, (scales, zeros) in narrower.items():
        codes = narrowed(weight, bits - width).codes
        part = Quantized(codes, scales.float().unsqueeze(-1), zeros.float().unsqueeze(-1))
        found[width] = choose_kernel(part, rounded)
    return found
