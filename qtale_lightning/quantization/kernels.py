"""Products with quantized weights: ours, PyTorch's int4 kernels, and the reference that dequantizes.

    y = x · Q(W)ᵀ,  Q(W) = (code - zero) · scale

A kernel is prepared once for a weight and a device, and keeps the weight in its own layout.
"""

from collections.abc import Mapping
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from qtale_lightning import cpu, cuda
from qtale_lightning.compat.kernels import has_bfloat16_kernels
from qtale_lightning.huge_pages import placed
from qtale_lightning.quantization.nested import narrowed
from qtale_lightning.quantization.planes import OUR_CROSSOVER_TOKENS, PlaneStrips, by_blocks
from qtale_lightning.quantization.rtn import Quantized

# Inputs of a group that PyTorch's int4 kernels take.
INT4_GROUP_SIZES = (32, 64, 128, 256)
# With this many tokens or more, dequantizing and a dense product are faster than PyTorch's kernel for the CPU, whose
# time grows with every token: benchmarks/linear.py measures both ways, and those of ours (`planes`).
CROSSOVER_TOKENS = 64
# Weights dequantized at a time by PyTorch's, 8 MB in bfloat16. Smaller blocks stay in nearer caches, but make the
# products narrow.
TILE_WEIGHTS = 2**22


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
            and _whole(weight.zeros)
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
        if self.planes > 1 or (rounded and not self.takes_rounded):
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
        codes, self.scales, self.zeros, self.scales_and_offsets = _int4_terms(weight)
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


class Int4CUDA:
    """4 bits or fewer in the layout of PyTorch's int4 kernel for CUDA (tinygemm), in bfloat16; where ours don't run."""

    name = "int4 kernel"

    def __init__(self, weight: Quantized) -> None:
        if not self.supports(weight):
            raise ValueError("the CUDA int4 kernel doesn't take this weight")
        self.outputs, _, self.group_size = weight.codes.shape
        codes, _, _, self.scales_and_offsets = _int4_terms(weight)
        nibbles = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        self.packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, _inner_tiles(codes.shape[1]))

    @staticmethod
    def supports(weight: Quantized) -> bool:
        """Whether the weight is on a GPU that has the kernel, with codes below 16 and a shape that it takes."""
        outputs, groups, group_size = weight.codes.shape
        return (
            has_bfloat16_kernels(weight.codes.device)
            and group_size in INT4_GROUP_SIZES
            and outputs % 8 == 0
            and _inner_tiles(groups * group_size) > 0
            and bool(weight.codes.max() < 16)
        )

    def __call__(self, x: Tensor) -> Tensor:
        low = x.to(torch.bfloat16).reshape(-1, x.shape[-1]).contiguous()
        product = torch.ops.aten._weight_int4pack_mm(
            low, self.packed, self.group_size, self.scales_and_offsets
        )
        return product.to(x.dtype).view(*x.shape[:-1], self.outputs)


class Int4Rows:
    """4 bits or fewer in rows, as our own operations for CUDA read them, `cuda.linear`; tokens of any dtype.

    The kernel for a few tokens (decode); for many (prefill), the weight is dequantized and multiplied densely. Codes,
    scales (float16, as stored) and zero points are exact.

    Raises:
        ValueError: `supports` is False for this weight.
    """

    name = "int4 by our CUDA operations"

    def __init__(self, weight: Quantized) -> None:
        if not self.supports(weight):
            raise ValueError("our CUDA operations don't take this weight")
        from qtale_lightning.cuda import linear as ours

        self._ours = ours
        self.outputs, groups, group_size = weight.codes.shape
        self.inputs = groups * group_size
        self.weight = ours.from_codes(weight.codes, weight.scales, weight.zeros)

    @staticmethod
    def supports(weight: Quantized) -> bool:
        """Whether the weight is on a GPU that runs them, with codes below 16 and groups that they take."""
        codes = weight.codes
        return cuda.available(codes.device) and codes.shape[2] in INT4_GROUP_SIZES and bool(codes.max() < 16)

    def __call__(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.inputs).contiguous()
        if len(tokens) <= self._ours.MOST_SEQUENCES:
            output = tokens.new_empty(len(tokens), self.outputs)
            self._ours.linear(tokens, [self.weight], output)
        else:
            levels = tokens.new_empty(self.outputs, self.inputs)
            self._ours.dequantize(self.weight, levels)
            output = linear(tokens, levels)
        return output.view(*x.shape[:-1], self.outputs)

    def operands(self) -> tuple[Tensor, ...]:
        """What `models.graph` takes: packed codes, scales and zero points."""
        values, scales, zeros, _ = self.weight
        assert scales is not None
        assert zeros is not None
        return values, scales, zeros


def _in_planes(weight: Quantized) -> Quantized:
    """8-bit codes as 4-bit ones of twice the inputs, the high halves first: (16 h + l - z) s, z and s split alike."""
    high, low = (weight.codes / 16).floor(), weight.codes % 16
    zeros = torch.cat([(weight.zeros / 16).floor(), weight.zeros % 16], 1)
    return Quantized(torch.cat([high, low], 1), torch.cat([16 * weight.scales, weight.scales], 1), zeros)


def rounded_product(kernel: Kernel, x: Tensor) -> Tensor:
    """A kernel's product of tokens rounded to 8 bits: by integers where it has them."""
    if isinstance(kernel, Int4Strips) and kernel.takes_rounded:
        return kernel.by_rounded(x)
    return kernel(round_tokens(x))


def _int4_terms(weight: Quantized) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def _inner_tiles(inputs: int) -> int:
    """The largest of the kernel's inner tile counts that divides the inputs; 0 where none does."""
    return next((tiles for tiles in (8, 4, 2) if inputs % (16 * tiles) == 0), 0)


def choose_kernel(weight: Quantized, rounded: bool = False) -> Kernel:
    """The fastest kernel that takes a weight where it lies, for tokens as they are or `rounded` to 8 bits."""
    few = bool(weight.codes.max() < 8) and not (rounded and _whole(weight.zeros))
    if (few or not _whole(weight.zeros)) and PlaneStrips.supports(weight):
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


def _whole(zeros: Tensor) -> bool:
    """Whether zero points are whole numbers: those of codes that are the highest bits of others are not."""
    return torch.equal(zeros, zeros.round())


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
