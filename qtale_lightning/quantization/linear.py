"""The quantized linear: how it is stored, and by which kernel it runs."""

import logging
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qtale_lightning.quantization.int4_cpu import Int4Strips
from qtale_lightning.quantization.int4_cuda import Int4Rows
from qtale_lightning.quantization.kernels import Kernel, kernels_for, rounded_product
from qtale_lightning.quantization.nested import of_highest, pack_planes, unpack_planes
from qtale_lightning.quantization.packing import pack_gemm, pack_tight, unpack_gemm, unpack_tight
from qtale_lightning.quantization.planes import PlaneStrips
from qtale_lightning.quantization.rtn import Quantized
from qtale_lightning.watch import note_change

log = logging.getLogger(__name__)

Layout = Literal["gemm", "tight"]
"""`gemm`: AutoAWQ's, 4 bits. `tight`: any width, without gaps; of nested codes the highest bits, and a plane for each
further one."""

PLANE = "plane"
"""What buffers of nested codes' lower bits are called, with the width that they complete behind it."""

TERMS = ("scales", "zeros")
"""The same of a narrower width's own scales and zero points, with the width behind it."""

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
        bits: of a code, of those that are in memory.
        group_size: inputs that share a scale.
        held: rising widths whose highest bits are stored by themselves (`plane3`, …, see `quantization.nested`), of
            which the last is that of scales and zero points; those above `bits` are left where they are. Empty: one
            width alone.

    Attributes:
        activation_bits: Of the tokens in its products; not stored.
        switches: Whether its precision may change while it runs, see `read_at`; by default where several are held.
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
        held: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.layout = bits, group_size, layout
        self.held = tuple(held) or (bits,)
        whole = bits == self.held[-1]
        self.switches = len(self.widths) > 1 and whole
        self.narrower = self.widths[:-1] if whole else (bits,)
        groups = in_features // group_size
        if layout == "gemm":
            self.register_buffer("qweight", torch.zeros(in_features, out_features // 8, dtype=torch.int32))
            self.register_buffer("qzeros", torch.zeros(groups, out_features // 8, dtype=torch.int32))
            self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        else:
            first, *more = self.widths
            columns = in_features // 8
            self.register_buffer("qweight", torch.zeros(out_features, columns * first, dtype=torch.uint8))
            for width in more:
                plane = torch.zeros(out_features, columns, dtype=torch.uint8)
                self.register_buffer(f"{PLANE}{width}", plane)
            for width, kind in product(self.narrower, TERMS):
                term = torch.zeros(out_features, groups, dtype=torch.float16)
                self.register_buffer(f"{kind}{width}", term)
            zeros = out_features * groups * self.held[-1] // 8
            self.register_buffer("qzeros", torch.zeros(zeros, dtype=torch.uint8))
            self.register_buffer("scales", torch.zeros(out_features, groups, dtype=torch.float16))
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), False) if bias else None
        self.activation_bits: ActivationBits = 16
        self.kernel: Kernel | None = None
        self.kernels: dict[int, Kernel] = {}  # by width
        self.device: torch.device | None = None  # of the kernel

    @property
    def widths(self) -> tuple[int, ...]:
        """Of nested codes those that are in memory, rising."""
        return tuple(width for width in self.held if width <= self.bits)

    @classmethod
    def of(
        cls,
        weight: Quantized,
        bits: int,
        layout: Layout,
        bias: Tensor | None = None,
        held: Sequence[int] = (),
        terms: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    ) -> "QuantizedLinear":
        """Packs codes, shape `(out, in / group_size, group_size)`, with their scales and zero points.

        Args:
            terms: by a narrower width that is held, scales and zero points of its codes, `(out, in / group_size)`; by
                default they follow from these.

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
            inputs = groups * group_size
            module = cls(inputs, outputs, bits, group_size, layout, bias is not None, held=held)
        codes, zeros = weight.codes.flatten(1), weight.zeros.squeeze(-1)
        if layout == "gemm":
            module.qweight, module.qzeros = pack_gemm(codes), pack_gemm(zeros)
            module.scales = scales.T.contiguous()
        else:
            module.qweight, *more = pack_planes(codes, module.widths)
            for width, plane in zip(module.widths[1:], more, strict=True):
                setattr(module, f"{PLANE}{width}", plane)
            for width in module.narrower:
                own = (terms or {}).get(width)
                if own is None:
                    derived = of_highest(weight.scales, weight.zeros, bits - width)
                    own = derived[0].squeeze(-1), derived[1].squeeze(-1)
                for kind, term in zip(TERMS, own, strict=True):
                    setattr(module, f"{kind}{width}", term.half().contiguous())
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
            planes = [qweight, *(getattr(self, f"{PLANE}{width}") for width in self.widths[1:])]
            codes = unpack_planes(planes, self.widths[0])
            zeros = unpack_tight(qzeros, self.held[-1]).view(self.out_features, -1)
        groups = codes.unflatten(1, (-1, self.group_size))
        if self.bits != self.held[-1]:
            scales, zeros = self._terms_of(self.bits)
        return Quantized(groups, scales.float().unsqueeze(-1), zeros.float().unsqueeze(-1))

    def _terms_of(self, width: int) -> tuple[Tensor, Tensor]:
        """Scales and zero points of a narrower width, `(out, in / group_size)`, float16."""
        scales, zeros = (getattr(self, f"{kind}{width}") for kind in TERMS)
        return scales, zeros

    def dequantize(self) -> Tensor:
        """The weight that the codes stand for, shape `(out, in)`, float32."""
        return self.quantized().dequantize()

    def prepare(self) -> None:
        """Chooses a kernel for the device that the module is on, and gives up the storage for its layout."""
        weight = self.quantized()
        narrower = {width: self._terms_of(width) for width in self.narrower} if self.switches else {}
        self.kernels = kernels_for(weight, self.bits, narrower, self.activation_bits == 8)
        self.kernel, self.device = self.kernels[self.bits], weight.codes.device
        note_change()
        if self.kernel.name not in _logged:
            _logged.add(self.kernel.name)
            log.info("quantized linears on %s (%d bits first): %s", self.device, self.bits, self.kernel.name)
        self.qweight = self.qzeros = self.scales = None
        for name in [*self._buffers]:
            setattr(self, name, None)

    def read_at(self, bits: int) -> None:
        """Computes with the codes' highest `bits` from now on, of those that are in memory.

        Raises:
            ValueError: they aren't, or it was loaded for one precision alone.
        """
        if self.kernel is None:
            self.prepare()
        if bits not in self.kernels:
            raise ValueError(f"there is no model at {bits} bits in memory, but at {sorted(self.kernels)}")
        self.kernel = self.kernels[bits]
        note_change()

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
        if not isinstance(self.kernel, Int4Strips | PlaneStrips):
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
        self._storage()
        kept = {
            name: part
            for name, part in self._buffers.items()
            if part is not None and part.is_floating_point()
        }
        super()._apply(fn, recurse)
        _, _, moved = self._storage()
        for name, part in kept.items():
            setattr(self, name, part.to(moved.device))
        return self
