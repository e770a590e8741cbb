"""The quantized linear: how it is stored, and by which kernel it runs."""

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qtale_lightning.quantization.kernels import Int4Rows, Int4Strips, Kernel, choose_kernel, rounded_product
from qtale_lightning.quantization.packing import pack_gemm, pack_tight, unpack_gemm, unpack_tight
from qtale_lightning.quantization.rtn import Quantized

log = logging.getLogger(__name__)

Layout = Literal["gemm", "tight"]
"""`gemm`: AutoAWQ's, 4 bits. `tight`: any width, without gaps."""

ActivationBits = Literal[16, 8]
"""8: tokens are rounded, and multiplied by integer instructions where there are some; 16: as they are."""

SMALLEST_HALF = 2.0**-24  # above zero

_logged: set[str] = set()


class QuantizedLinear(nn.Module):
    """Stands where an `nn.Linear` was; made for inference.

    Stored as packed codes (`qweight`), packed zero points (`qzeros`) and float16 scales (`scales`), in AutoAWQ's
    shapes with layout `gemm`, with outputs first with layout `tight`. The first call prepares a kernel for the device
    that the module is on; from then on the weight is kept in the kernel's layout alone.

    Args:
        bits: of a code.
        group_size: inputs that share a scale.

    Attributes:
        activation_bits: Of the tokens in its products; not stored.
    """

    qweight: Tensor | None
    qzeros: Tensor | None
    scales: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        layout: Layout,
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.layout = bits, group_size, layout
        groups = in_features // group_size
        if layout == "gemm":
            self.register_buffer("qweight", torch.zeros(in_features, out_features // 8, dtype=torch.int32))
            self.register_buffer("qzeros", torch.zeros(groups, out_features // 8, dtype=torch.int32))
            self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        else:
            self.register_buffer(
                "qweight", torch.zeros(out_features, in_features * bits // 8, dtype=torch.uint8)
            )
            self.register_buffer("qzeros", torch.zeros(out_features * groups * bits // 8, dtype=torch.uint8))
            self.register_buffer("scales", torch.zeros(out_features, groups, dtype=torch.float16))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), False) if bias else None
        self.activation_bits: ActivationBits = 16
        self.kernel: Kernel | None = None
        self.device: torch.device | None = None  # of the kernel

    @classmethod
    def of(
        cls, weight: Quantized, bits: int, layout: Layout, bias: Tensor | None = None
    ) -> "QuantizedLinear":
        """Packs codes, shape `(out, in / group_size, group_size)`, with their scales and zero points.

        Raises:
            ValueError: a scale leaves float16's range, or the shape doesn't fit the layout.
        """
        outputs, groups, group_size = weight.codes.shape
        scales = weight.scales.squeeze(-1).half()
        # A group of zeros is that at any scale, and a row's AWQ scale may take its smallest one below float16's.
        silent = (weight.codes == weight.zeros).all(-1)
        scales = scales.where(~silent, scales.clamp(min=SMALLEST_HALF))
        if not (scales.isfinite() & (scales > 0)).all():
            raise ValueError(
                "a group's scale leaves the range of float16: the weights are too large or small"
            )
        with torch.device("meta"):  # every tensor is replaced below
            module = cls(groups * group_size, outputs, bits, group_size, layout, bias is not None)
        codes, zeros = weight.codes.flatten(1), weight.zeros.squeeze(-1)
        if layout == "gemm":
            module.qweight, module.qzeros = pack_gemm(codes), pack_gemm(zeros)
            module.scales = scales.T.contiguous()
        else:
            module.qweight = pack_tight(codes, bits)
            module.qzeros = pack_tight(zeros.flatten(), bits)
            module.scales = scales.contiguous()
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone(), False)
        return module

    def quantized(self) -> Quantized:
        """The stored codes, shape `(out, in / group_size, group_size)`, scales and zero points.

        Raises:
            RuntimeError: the storage was given up for a kernel.
        """
        qweight, qzeros, scales = self._storage()
        if self.layout == "gemm":
            codes, zeros, scales = unpack_gemm(qweight), unpack_gemm(qzeros), scales.T
        else:
            codes = unpack_tight(qweight, self.bits)
            zeros = unpack_tight(qzeros, self.bits).view(self.out_features, -1)
        groups = codes.unflatten(1, (-1, self.group_size))
        return Quantized(groups, scales.float().unsqueeze(-1), zeros.float().unsqueeze(-1))

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, shape `(out, in)`, float32."""
        return self.quantized().dequantize()

    def prepare(self) -> None:
        """Chooses a kernel for the device that the module is on, and gives up the storage for its layout."""
        weight = self.quantized()
        self.kernel, self.device = choose_kernel(weight), weight.codes.device
        if self.kernel.name not in _logged:
            _logged.add(self.kernel.name)
            log.info("quantized linears on %s (%d bits first): %s", self.device, self.bits, self.kernel.name)
        self.qweight = self.qzeros = self.scales = None

    def forward(self, x: Tensor) -> Tensor:
        """Shape `(..., out)` in the input's dtype, from `(..., in)`; no gradient passes, whatever the kernel."""
        if self.kernel is None:
            self.prepare()
        assert self.kernel is not None
        x = x.detach() if x.requires_grad else x
        output = rounded_product(self.kernel, x) if self.activation_bits == 8 else self.kernel(x)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        """The kernel's tensors, as `cpu.decoder` or `models.graph` takes them; None where it can't."""
        if isinstance(self.kernel, Int4Rows):
            return None if self.activation_bits == 8 else self.kernel.operands()
        if not isinstance(self.kernel, Int4Strips):
            return None
        return self.kernel.operands(rounded=self.activation_bits == 8)

    def extra_repr(self) -> str:
        """For printing the model."""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"

    def _storage(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.qweight is None or self.qzeros is None or self.scales is None:
            raise RuntimeError(
                "this quantized model runs already, from its kernels' layouts: load its folder again to save, "
                "convert or move it"
            )
        return self.qweight, self.qzeros, self.scales

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._storage()
        super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        """Moves to another device; a new floating dtype is for activations, and leaves the stored scales alone."""
        if self.kernel is not None:
            if fn(torch.empty(0, device=self.device)).device != self.device:
                self._storage()
            return self
        _, _, scales = self._storage()
        super()._apply(fn, recurse)
        _, _, moved = self._storage()
        self.scales = scales.to(moved.device)
        return self
