"""A linear that multiplies one token fast: decoding at batch 1 reads weights and does little else."""

from functools import cache

import torch
from torch import Tensor, nn


@cache
def reads_faster_alone() -> bool:
    """Whether PyTorch's matrix-vector kernel reads bfloat16 weights faster than the product that `nn.Linear` calls.

    Of one token, measured by benchmarks/latency.py and benchmarks/families.py: by a third on a processor with AMX,
    whose tiles are made for many tokens; on one with AVX-512's bfloat16 instructions alone it takes 1.5 times as long.
    """
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


class RoutedLinear(nn.Linear):
    """`nn.Linear`, whose product for a single bfloat16 token on a CPU is the kernel that is faster there.

    The two sum in another order: equal within bfloat16's rounding.
    """

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, ...] | None:
        """The weight, as `cpu.decoder` takes it for tokens of a dtype; None where it can't."""
        takes = self.weight.dtype == dtype and self.weight.is_contiguous()
        return (self.weight,) if takes else None

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(..., out)`` from ``(..., in)``."""
        weight = self.weight
        single = x.numel() == x.shape[-1] == self.in_features and self.bias is None
        low = x.dtype == weight.dtype == torch.bfloat16 and x.is_cpu
        if single and low and not torch.is_grad_enabled() and reads_faster_alone():
            return torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)
        # In inference mode PyTorch would copy the weight for every row of a strided batch: of a prompt's last position,
        # the whole vocabulary's.
        return super().forward(x.contiguous())
