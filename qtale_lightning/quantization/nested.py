"""Nested codes: a model whose codes' highest bits are codes of narrower models (Matryoshka quantization).

    code = step · high + low,  step = 2^(bits dropped)
    (high - z') · s',  s' = step · scale,  z' = (zero - (step - 1) / 2) / step

Of the `step` codes that share their highest bits, what is left stands for the middle: so scales and zero points of a
narrower width follow from the codes' own. They are where learning begins; what is stored beside the codes is fitted
from there (`terms`), which measurably loses less (benchmarks/README.md). MatQuant (Nair et al. 2025) rounds codes to
narrower ones; this takes their highest bits as they are, which a kernel can read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qtale_lightning.quantization.packing import pack_tight, unpack_tight
from qtale_lightning.quantization.rtn import Quantized


def of_highest(scales: Tensor, zeros: Tensor, dropped: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points, which are fractions then, of codes without some of their lowest bits."""
    step = 2**dropped
    return scales * step, (zeros - (step - 1) / 2) / step


def narrowed(weight: Quantized, dropped: int) -> Quantized:
    """A weight without some of its codes' lowest bits."""
    codes = weight.codes.div(2**dropped, rounding_mode="floor")
    return Quantized(codes, *of_highest(weight.scales, weight.zeros, dropped))


def pack_planes(codes: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Codes as planes: the highest bits, of the first of some rising widths, and a further bit for each other one.

    Args:
        codes: whole numbers 0..2^bits - 1, shape `(out, in)`, where bits is the last of the widths.

    Returns:
        Shape `(out, in · width / 8)` of the first one, `(out, in / 8)` of the others, uint8.

    Raises:
        ValueError: see :func:`~qtale_lightning.quantization.packing.pack_tight`.
    """
    whole, bits = codes.to(torch.uint8), widths[-1]
    high = pack_tight(whole >> bits - widths[0], widths[0])
    return [high, *(pack_tight((whole >> bits - width) & 1, 1) for width in widths[1:])]


def unpack_planes(planes: Sequence[Tensor], lowest: int) -> Tensor:
    """The codes, shape `(out, in)`, uint8, of the first ones of what :func:`pack_planes` gave, for widths from
    `lowest` on."""
    codes = unpack_tight(planes[0], lowest)
    for plane in planes[1:]:
        codes = codes << 1 | unpack_tight(plane, 1)
    return codes
