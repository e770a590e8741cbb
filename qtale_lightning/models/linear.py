"""A linear that multiplies few tokens fast: those of decoding, and of short prompts."""

import torch
from torch import Tensor, nn

from qtale_lightning import cpu, huge_pages


class RoutedLinear(nn.Linear):
    """`nn.Linear`, whose product of few tokens on a CPU is ours: see `cpu/dense.h`, and benchmarks/dense.py.

    The two sum in another order: equal within their dtype's rounding.
    """

    _settled = 0  # where the weight was when it was last seen to

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        """The weight, as `cpu.decoder` takes it for tokens of a dtype; None where it can't."""
        own = "weight" in self._parameters  # not computed by a parametrization
        takes = own and self.weight.dtype == dtype and self.weight.is_contiguous()
        if takes:
            self._settle()
        return (self.weight,) if takes else None

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(..., out)`` from ``(..., in)``."""
        # In inference mode PyTorch would copy the weight for every row of a strided batch: of a prompt's last position,
        # the whole vocabulary's.
        x = x.contiguous()
        if x.numel() and self._is_ours(x) and x.numel() <= cpu.few_tokens(x.dtype) * self.in_features:
            self._settle()
            return cpu.dense_linear(x, self.weight, self.bias)
        return super().forward(x)

    def _settle(self) -> None:
        """Have the weight in huge pages, from the first product of few tokens on."""
        if self._settled != self.weight.data_ptr():
            huge_pages.settle(self.weight)
            self._settled = self.weight.data_ptr()

    def _is_ours(self, x: Tensor) -> bool:
        """Whether our operation takes these tokens."""
        fits = x.shape[-1] == self.in_features and self.weight.is_contiguous()
        fits = fits and self.in_features % cpu.LANES == self.out_features % cpu.LANES == 0
        others = (self.weight,) if self.bias is None else (self.weight, self.bias)
        return fits and cpu.ready(x, *others)
