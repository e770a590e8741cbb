"""int4 products on a GPU: by our own operations in Triton, and by PyTorch's kernel where those don't run."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from qtale_lightning import cuda
from qtale_lightning.compat.kernels import has_bfloat16_kernels
from qtale_lightning.quantization.int4 import INT4_GROUP_SIZES, int4_terms
from qtale_lightning.quantization.rtn import Quantized


class Int4CUDA:
    """4 bits or fewer in the layout of PyTorch's int4 kernel for CUDA (tinygemm), in bfloat16; where ours don't run."""

    name = "int4 kernel"

    def __init__(self, weight: Quantized) -> None:
        if not self.supports(weight):
            raise ValueError("the CUDA int4 kernel doesn't take this weight")
        self.outputs, _, self.group_size = weight.codes.shape
        codes, _, _, self.scales_and_offsets = int4_terms(weight)
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


def _inner_tiles(inputs: int) -> int:
    """The largest of the kernel's inner tile counts that divides the inputs; 0 where none does."""
    return next((tiles for tiles in (8, 4, 2) if inputs % (16 * tiles) == 0), 0)
