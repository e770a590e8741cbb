"""What the int4 kernels share: the terms of PyTorch's, and tokens rounded to 8 bits."""

import torch
from torch import Tensor

from qtale_lightning.quantization.rtn import Quantized

# Inputs of a group that PyTorch's int4 kernels take.
INT4_GROUP_SIZES = (32, 64, 128, 256)

BLOCK_INPUTS = 32
"""Inputs of a token that share a scale where tokens are rounded to 8 bits."""


def round_tokens(x: Tensor) -> Tensor:
    """Tokens `(..., in)` rounded to 8 bits in blocks of :data:`BLOCK_INPUTS`: what `activation_bits` 8 multiplies.

    A block's scale is its largest magnitude by 127. `cpu/int4_8.h` does the same in whole numbers.
    """
    blocks = x.float().unflatten(-1, (-1, BLOCK_INPUTS))
    most = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, torch.full_like(most, 127) / most, 0)
    return ((blocks * inverse).round() * (most / 127)).flatten(-2).to(x.dtype)


def int4_terms(weight: Quantized) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, shape `(out, in)`, scales and zero points, `(groups, out)`, and the kernels' `(groups, out, 2)` of both.

    The kernels' levels are (code - 8) · scale + offset with offset = (8 - zero) · scale, rounded to bfloat16: codes of
    fewer than 4 bits are moved to the middle, where offsets and so their rounding are small.
    """
    codes = weight.codes.flatten(1).to(torch.uint8)
    shift = (15 - int(codes.max())) // 2
    scales, zeros = (term.squeeze(-1).T.float().contiguous() for term in (weight.scales, weight.zeros))
    zeros = zeros + shift
    both = torch.stack([scales, (8 - zeros) * scales], dim=-1)
    return codes + shift, scales, zeros, both.to(torch.bfloat16).contiguous()


def are_whole(zeros: Tensor) -> bool:
    """Whether zero points are whole numbers: those of codes that are the highest bits of others are not."""
    return torch.equal(zeros, zeros.round())
