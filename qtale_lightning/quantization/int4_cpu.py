"""int4 products on a CPU: by our own operations, and by PyTorch's kernel where those weren't built."""

from functools import cache

import torch
from torch import Tensor

from qtale_lightning import cpu
from qtale_lightning.huge_pages import placed
from qtale_lightning.quantization.int4 import BLOCK_INPUTS, INT4_GROUP_SIZES, are_whole, int4_terms
from qtale_lightning.quantization.planes import OUR_CROSSOVER_TOKENS, by_blocks
from qtale_lightning.quantization.rtn import Quantized

# With this many tokens or more, dequantizing and a dense product are faster than PyTorch's kernel for the CPU, whose
# time grows with every token: benchmarks/linear.py measures both ways, and those of ours (`planes`).
CROSSOVER_TOKENS = 64
# Weights dequantized at a time by PyTorch's, 8 MB in bfloat16. Smaller blocks stay in nearer caches, but make the
# products narrow.
TILE_WEIGHTS = 2**22


class Int4Strips:
    """8 bits or fewer in the layout of our own operations for the CPU, `cpu/int4.h`.

    Its codes have 4 bits. Wider ones are two weights side by side, code = 16 · high + low, that see the same tokens.

    Tokens are multiplied with the codes themselves; many (prefill), where dense products are by AMX, with blocks of
    outputs that are dequantized. Codes, scales (float16, as stored) and zero points are exact, for tokens of any dtype.

    Raises:
        ValueError: `supports` is False for this weight.
    """

    name = "int4 by our CPU operations"

    def __init__(self, weight: Quantized) -> None:
        if not self.supports(weight):
            raise ValueError(f"our CPU operations don't take a weight of {len(weight.codes)} outputs")
        self.planes = 1 if weight.codes.max() < 16 else 2
        if self.planes == 2:
            weight = _in_planes(weight)
        outputs, groups, group_size = weight.codes.shape
        inputs = groups * group_size
        self.outputs, self.inputs = outputs, inputs // self.planes
        self.takes_rounded = group_size % BLOCK_INPUTS == 0
        # By strip of 16 outputs: 8 inputs of each in 32 bits, the first one lowest.
        nibbles = weight.codes.flatten(1).to(torch.uint8).view(-1, 16, inputs // 8, 4, 2).transpose(1, 2)
        self.packed = placed((nibbles[..., 0] | nibbles[..., 1] << 4).reshape(-1, inputs // 8, 64))
        scales, zeros = (term.view(-1, 16, groups).transpose(1, 2) for term in (weight.scales, weight.zeros))
        self.scales, self.zeros = placed(scales.half()), placed(zeros.to(torch.uint8))

    @staticmethod
    def supports(weight: Quantized) -> bool:
        """Whether the operations were built, and the weight is on the CPU, in shapes that they take."""
        outputs, groups, group_size = weight.codes.shape
        return (
            weight.codes.device.type == "cpu"
            and outputs % 16 == group_size % 16 == groups * group_size % 32 == 0
            and are_whole(weight.zeros)
            and bool(
                weight.codes.max() < 16 or weight.scales.max() < 2**11
            )  # 16 times that is a float16, too
            and cpu.available()
        )

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.float32, torch.bfloat16):
            return self(x.float()).to(x.dtype)
        tiles = x.dtype == torch.bfloat16 and cpu.multiplies_in_tiles()
        if not tiles or x.numel() < OUR_CROSSOVER_TOKENS * self.inputs:
            return self.by_kernel(x)
        return self.by_blocks(x.reshape(-1, self.inputs)).view(*x.shape[:-1], self.outputs)

    def operands(self, rounded: bool) -> tuple[Tensor, ...] | None:
        """What `cpu.decoder` takes, with an empty tensor behind it for tokens that it rounds; None where it can't."""
        if rounded and not self.takes_rounded:
            return None
        weight = self.packed, self.scales, self.zeros
        return (*weight, self.packed.new_empty(0)) if rounded else weight

    def by_kernel(self, x: Tensor) -> Tensor:
        """Products with the codes: the time grows with every token."""
        return cpu.int4_linear(self._of_planes(x), self.packed, self.scales, self.zeros)

    def by_rounded(self, x: Tensor) -> Tensor:
        """Products of tokens rounded to 8 bits, `round_tokens`, by integers; where `takes_rounded`."""
        if x.dtype not in (torch.float32, torch.bfloat16):
            return self.by_rounded(x.float()).to(x.dtype)
        return cpu.int4_linear_rounded(self._of_planes(x), self.packed, self.scales, self.zeros)

    def _of_planes(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.inputs:
            raise RuntimeError(f"these weights take tokens of {self.inputs} inputs, not {x.shape[-1]}")
        return x.contiguous() if self.planes == 1 else torch.cat([x, x], -1)

    def by_blocks(self, x: Tensor) -> Tensor:
        """Dense products of tokens `(M, in)` with blocks of outputs, each dequantized just before."""
        return by_blocks(
            self._of_planes(x),
            self.outputs,
            lambda first, count, like: cpu.int4_dequantize(
                self.packed, self.scales, self.zeros, first, count, like
            ),
        )


class Int4CPU:
    """4 bits or fewer in the layout of PyTorch's int4 kernel for the CPU: where our own operations weren't built.

    The kernel itself for a few tokens (decode), where reading the weights takes the time; for many (prefill), blocks
    of outputs are dequantized and multiplied densely. The kernel computes in bfloat16 only: other
    dtypes are always dequantized.

    Raises:
        ValueError: `supports` is False for this weight.
    """

    def __init__(self, weight: Quantized) -> None:
        self.outputs, _, self.group_size = weight.codes.shape
        block = kernel_block()
        if block is None or not self.supports(weight):
            raise ValueError(f"the CPU's int4 kernel doesn't take a weight of {self.outputs} outputs")
        self.name = "int4 kernel or blocks" if self.group_size in INT4_GROUP_SIZES else "int4 blocks"
        codes, self.scales, self.zeros, self.scales_and_offsets = int4_terms(weight)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
        self.blocks = self.packed.view(self.outputs // block, codes.shape[1], block // 2)

    @staticmethod
    def supports(weight: Quantized) -> bool:
        """Whether the weight is on the CPU, with codes below 16 and outputs in whole blocks."""
        block = kernel_block()
        return (
            weight.codes.device.type == "cpu"
            and block is not None
            and weight.codes.shape[0] % block == 0
            and bool(weight.codes.max() < 16)
        )

    def __call__(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        takes = x.dtype == torch.bfloat16 and self.group_size in INT4_GROUP_SIZES
        product = self.by_kernel if takes and len(tokens) < CROSSOVER_TOKENS else self.by_blocks
        return product(tokens).view(*x.shape[:-1], self.outputs)

    def by_kernel(self, x: Tensor) -> Tensor:
        """PyTorch's kernel, for bfloat16 tokens: its time grows with every token."""
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.packed, self.group_size, self.scales_and_offsets
        )

    def by_blocks(self, x: Tensor) -> Tensor:
        """Dense products with blocks of outputs, each dequantized just before."""
        n_blocks, inputs, half = self.blocks.shape
        block = 2 * half
        step = max(1, TILE_WEIGHTS // (inputs * block))
        scales, zeros = self.scales.to(x.dtype), self.zeros.to(x.dtype)
        products = []
        for first in range(0, n_blocks, step):
            bytes_ = self.blocks[first : first + step].transpose(0, 1)  # (in, blocks, block / 2)
            columns = slice(first * block, (first + bytes_.shape[1]) * block)
            weight = x.new_empty(inputs, bytes_.shape[1], 2, half)  # the codes of outputs, by block and half
            weight[:, :, 0] = bytes_ & 15
            weight[:, :, 1] = bytes_ >> 4
            groups = weight.view(-1, self.group_size, bytes_.shape[1] * block)
            groups.sub_(zeros[:, None, columns]).mul_(scales[:, None, columns])
            products.append(x @ groups.flatten(0, 1))
        return torch.cat(products, dim=-1)


def _in_planes(weight: Quantized) -> Quantized:
    """8-bit codes as 4-bit ones of twice the inputs, the high halves first: (16 h + l - z) s, z and s split alike."""
    high, low = (weight.codes / 16).floor(), weight.codes % 16
    zeros = torch.cat([(weight.zeros / 16).floor(), weight.zeros % 16], 1)
    return Quantized(torch.cat([high, low], 1), torch.cat([16 * weight.scales, weight.scales], 1), zeros)


@cache
def kernel_block() -> int | None:
    """Outputs in a block of the CPU kernel's layout here, or None where the layout is another one.

    The layout follows the processor: a block of 64 outputs with AVX-512, of 32 with AVX2. In a block, byte j of an
    input holds output j in its low and output j + block / 2 in its high half. It is not documented, so it is probed.
    """
    inputs = 32
    # Random codes: they differ between outputs as between inputs, so that no other layout passes for one of these.
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (128, inputs), generator=generator, dtype=torch.int32, device="cpu")
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (RuntimeError, AttributeError):
        return None
    for block in (64, 32):
        halves = packed.view(128 // block, inputs, block // 2)
        found = torch.cat([halves & 15, halves >> 4], dim=-1).transpose(1, 2).flatten(0, 1)
        if torch.equal(found.int(), codes):
            return block
    return None
