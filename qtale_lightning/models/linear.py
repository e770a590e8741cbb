"""A linear that multiplies one token fast: decoding at batch 1 reads weights and does little else."""

import torch
from torch import Tensor, nn


class RoutedLinear(nn.Linear):
    """`nn.Linear`, whose product for a single bfloat16 token on a CPU is PyTorch's matrix-vector kernel.

    That reads weights about a third faster than the matrix product that `nn.Linear` would call (see
    benchmarks/latency.py), and sums in another order: equal within bfloat16's rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(..., out)`` from ``(..., in)``."""
        weight = self.weight
        single = x.numel() == x.shape[-1] == self.in_features and self.bias is None
        if single and x.dtype == weight.dtype == torch.bfloat16 and x.is_cpu and not torch.is_grad_enabled():
            return torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)
        # In inference mode PyTorch would copy the weight for every row of a strided batch: of a prompt's last position,
        # the whole vocabulary's.
        return super().forward(x.contiguous())
