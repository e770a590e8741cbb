"""Weights of 2, 3 and 4 bits in planes, for our CPU operations: a product reads no more bits than its weight has."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from qtale_lightning import cpu
from qtale_lightning.huge_pages import placed
from qtale_lightning.quantization.rtn import Quantized

HIGH, WIDEST = 2, 4  # bits of the first plane, and of all
GROUP = 32  # a group has a multiple of so many inputs
# With this many tokens or more, dequantizing and a dense product are faster than our kernels for the CPU, whose time
# grows with every token: benchmarks/linear.py measures both ways (where dense products are by AMX; else our kernels are
# as fast for any number).
OUR_CROSSOVER_TOKENS = 32
# Outputs dequantized at a time by our operations. With fewer than 1024, products of some numbers of tokens take oneDNN
# twice the time; with more, blocks leave the caches.
BLOCK_OUTPUTS = 2048


class PlaneStrips:
    """4 bits or fewer in the layout of our own operations for the CPU, `cpu/planes.h`.

    The highest 2 bits of all codes, and a plane for each further one: a model `at` fewer bits is what is read of them,
    from the same memory. Codes, scales (float16) and zero points, which may be fractions, are those of float16.

    Raises:
        ValueError: `supports` is False for this weight.
    """

    name = "planes of bits by our CPU operations"

    def __init__(self, weight: Quantized, bits: int | None = None) -> None:
        """Lays out a weight.

        Args:
            bits: of a code; by default as few as its codes take.
        """
        if not self.supports(weight):
            raise ValueError(f"planes take no weight of {len(weight.codes)} outputs")
        outputs, groups, size = weight.codes.shape
        self.outputs, self.inputs = outputs, groups * size
        self.bits = self.held = bits or max(HIGH, int(weight.codes.max().item()).bit_length())
        codes = weight.codes.flatten(1).to(torch.int64)
        self.high = placed(_plane(codes >> self.held - HIGH, HIGH))
        self.single = [placed(_plane(codes >> place & 1, 1)) for place in reversed(range(self.held - HIGH))]
        self.scales, self.zeros = (_by_strip(term.squeeze(-1)) for term in (weight.scales, weight.zeros))

    @staticmethod
    def supports(weight: Quantized) -> bool:
        """Whether the operations were built, and the weight is on the CPU, in shapes that they take."""
        outputs, _, size = weight.codes.shape
        return (
            weight.codes.device.type == "cpu"
            and outputs % 16 == size % GROUP == 0
            and bool(weight.codes.max() < 2**WIDEST)
            and cpu.available()
        )

    def at(self, bits: int, scales: Tensor, zeros: Tensor) -> "PlaneStrips":
        """The weight at fewer bits than are held, from the same planes.

        Args:
            scales, zeros: of it, `(out, in / group_size)`.
        """
        narrower = copy.copy(self)
        narrower.bits, narrower.single = bits, self.single[: bits - HIGH]
        narrower.scales, narrower.zeros = _by_strip(scales), _by_strip(zeros)
        return narrower

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.float32, torch.bfloat16):
            return self(x.float()).to(x.dtype)
        if x.shape[-1] != self.inputs:
            raise RuntimeError(f"these weights take tokens of {self.inputs} inputs, not {x.shape[-1]}")
        tiles = x.dtype == torch.bfloat16 and cpu.multiplies_in_tiles()
        if not tiles or x.numel() < OUR_CROSSOVER_TOKENS * self.inputs:
            return cpu.plane_linear(x.contiguous(), self.high, self.scales, self.zeros, self.single)
        product = by_blocks(x.reshape(-1, self.inputs), self.outputs, self.dequantize)
        return product.view(*x.shape[:-1], self.outputs)

    def dequantize(self, first: int, count: int, like: Tensor) -> Tensor:
        """Some outputs of the weight, ``(count, in)``, in the dtype of ``like``."""
        return cpu.plane_dequantize(self.high, self.scales, self.zeros, self.single, first, count, like)

    def operands(self, rounded: bool) -> tuple[Tensor, ...] | None:
        """What `cpu.decoder` takes; None for tokens that it would have to round."""
        return None if rounded else (self.high, self.scales, self.zeros, *self.single)


def by_blocks(x: Tensor, outputs: int, dequantize: Callable[[int, int, Tensor], Tensor]) -> Tensor:
    """Dense products of tokens `(M, in)` with blocks of outputs, each dequantized just before."""
    output = x.new_empty(len(x), outputs)
    strips, blocks = outputs // 16, -(-outputs // BLOCK_OUTPUTS)
    for block in range(blocks):
        first, end = (16 * (strips * place // blocks) for place in (block, block + 1))
        torch.mm(x, dequantize(first, end - first, x).T, out=output[:, first:end])
    return output


def _by_strip(terms: Tensor) -> Tensor:
    """Of groups, `(out, groups)`, by strip of 16 outputs, float16."""
    return placed(terms.view(-1, 16, terms.shape[1]).transpose(1, 2).half())


def _plane(fields: Tensor, bits: int) -> Tensor:
    """Fields of so many bits, `(out, in)`, by strip of 16 outputs: what 32 bits of each hold, the first lowest."""
    of_word = 32 // bits
    words = fields.unflatten(1, (-1, of_word)) << torch.arange(0, 32, bits)
    strips = words.sum(-1).view(-1, 16, fields.shape[1] // of_word).transpose(1, 2)
    return strips.contiguous().view(torch.uint8).view(*strips.shape, 8)[..., :4].flatten(2).contiguous()
