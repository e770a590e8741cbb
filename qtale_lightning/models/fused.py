"""LLaMA's norm, MLP and rotation, computed in one pass over memory where the CPU's operations can."""

from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, rotate_half

from qtale_lightning import cpu


class RoutedRMSNorm(LlamaRMSNorm):
    """`LlamaRMSNorm`; on a CPU, without gradients, by `cpu.rms_norm`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Shape ``(..., D)`` from ``(..., D)``."""
        if cpu.ready(hidden_states, self.weight) and hidden_states.shape[-1] % cpu.LANES == 0:
            return cpu.rms_norm(hidden_states.contiguous(), self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


class RoutedMLP(LlamaMLP):
    """`LlamaMLP`; on a CPU, without gradients, its activation by `cpu.swiglu`."""

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(..., D)`` from ``(..., D)``."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.config.hidden_act == "silu" and cpu.ready(gate, up) and gate.shape[-1] % cpu.LANES == 0:
            return self.down_proj(cpu.swiglu(gate, up))
        return self.down_proj(self.act_fn(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Hugging Face's rotary embedding: heads ``(B, T, H, d)`` rotated by cosines and sines ``(1|B, T, d)``."""
    if cpu.ready(x, cos, sin) and x.shape[-1] % (2 * cpu.LANES) == 0:
        return cpu.rotate(x.contiguous(), cos.contiguous(), sin.contiguous())
    return x * cos.unsqueeze(2) + rotate_half(x) * sin.unsqueeze(2)
