"""How codes are stored: AutoAWQ's GEMM layout for 4 bits, and a tight one for every width."""

import torch
from torch import Tensor

# AutoAWQ's order of eight 4-bit codes in an int32, lowest bits first.
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_tight(codes: Tensor, bits: int) -> Tensor:
    """Stores codes without gaps: eight codes in `bits` bytes, the first code in the lowest bits.

    Args:
        codes: whole numbers 0..2^bits - 1, shape `(..., n)`; n must be a multiple of 8.

    Returns:
        Shape `(..., n · bits / 8)`, uint8.

    Raises:
        ValueError: n is not a multiple of 8.
    """
    if codes.shape[-1] % 8:
        raise ValueError(f"{codes.shape[-1]} codes a row can't be packed tightly: give a multiple of 8")
    eights = codes.to(torch.int64).unflatten(-1, (-1, 8)) << _shifts(8, bits, codes.device)
    words = eights.sum(-1, keepdim=True)  # no two codes share a bit: the sum is their union
    return words.view(torch.uint8)[..., :bits].flatten(-2).contiguous()


def unpack_tight(packed: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`pack_tight`: shape `(..., n · bits / 8)`, uint8, to `(..., n)`, uint8."""
    eights = packed.unflatten(-1, (-1, bits))
    words = torch.nn.functional.pad(eights, (0, 8 - bits)).contiguous().view(torch.int64)
    return ((words >> _shifts(8, bits, packed.device)) & (2**bits - 1)).to(torch.uint8).flatten(-2)


def pack_gemm(codes: Tensor) -> Tensor:
    """4-bit codes in AutoAWQ's GEMM layout (`WQLinear_GEMM`): eight outputs in an int32, inputs along rows.

    Args:
        codes: shape `(out, in)`, 0..15; zero points are stored alike, with groups for inputs.

    Returns:
        Shape `(in, out / 8)`, int32.

    Raises:
        ValueError: the outputs are not a multiple of 8.
    """
    if codes.shape[0] % 8:
        raise ValueError(f"AutoAWQ's layout needs a multiple of 8 outputs, not {codes.shape[0]}")
    eights = codes.to(torch.int64).T.unflatten(-1, (-1, 8))[..., list(GEMM_ORDER)]
    words = (eights << _shifts(8, 4, codes.device)).sum(-1)
    return words.to(torch.int32)  # wraps around: the highest code reaches the sign bit


def unpack_gemm(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack_gemm`: shape `(in, out / 8)`, int32, to `(out, in)`, uint8."""
    eights = (packed.unsqueeze(-1) >> _shifts(8, 4, packed.device).to(torch.int32)) & 15
    codes = torch.empty_like(eights, dtype=torch.uint8)
    codes[..., list(GEMM_ORDER)] = eights.to(torch.uint8)
    return codes.flatten(-2).T.contiguous()


def _shifts(count: int, bits: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) * bits
