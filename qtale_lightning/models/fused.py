"""What a routed layer computes faster than Hugging Face's modules do, under the same names and from the same weights.

Norm, MLP and rotation are computed in one pass over memory where the CPU's operations can; the attention's queries,
and all that follows them, only for the tokens that are asked for. It is for families that are LLaMA's but for what
they declare (`Architecture.fused`); the layer that these are held to is Hugging Face's own, in `RoutedLayer`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qtale_lightning import cpu
from qtale_lightning.models.attention import Attention, Packed
from qtale_lightning.models.routed_layer import RoutedLayer


class FusedRMSNorm(nn.Module):
    """A family's RMSNorm; on a CPU, without gradients, by `cpu.rms_norm`."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Shape ``(..., D)`` from ``(..., D)``."""
        if cpu.ready(hidden_states, self.weight) and hidden_states.shape[-1] % cpu.LANES == 0:
            return cpu.rms_norm(hidden_states.contiguous(), self.weight, self.variance_epsilon)
        return super().forward(hidden_states)


class FusedMLP(nn.Module):
    """A family's gated MLP; on a CPU, without gradients, its activation by `cpu.swiglu`."""

    config: Any
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(..., D)`` from ``(..., D)``."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        silu = getattr(self.config, "hidden_act", None) == "silu"
        if silu and cpu.ready(gate, up) and gate.shape[-1] % cpu.LANES == 0:
            return self.down_proj(cpu.swiglu(gate, up))
        return self.down_proj(self.act_fn(gate) * up)


class FusedAttention(nn.Module):
    """A family's projections, and norms over heads where it has them, around an attention of our own."""

    head_dim: int
    scaling: float
    attention_dropout: float | None
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def forward(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], attend: Attention) -> Tensor:
        """Shape ``(B, T', D)`` of the tokens that ``attend`` is asked for, from ``(B, T, D)``.

        ``rotary`` holds cosines and sines, ``(1|B, T, d)``.
        """
        asked = attend.asked(hidden_states)
        query = self._heads(self.q_proj, asked)
        if hasattr(self, "q_norm"):
            query = self.q_norm(query)
        of_asked = rotary
        if asked is not hidden_states:
            cos, sin = (attend.asked(x.expand(*hidden_states.shape[:2], -1)) for x in rotary)
            of_asked = cos, sin
        query, (key, value) = rotate(query, *of_asked), self.keys_values(hidden_states, rotary)
        dropout = float(self.attention_dropout or 0.0) if self.training else 0.0
        return self.o_proj(attend(query, key, value, self.scaling, dropout).flatten(2))

    def keys_values(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values, ``(B, T, H_kv, d)`` each, of ``(B, T, D)``."""
        key, value = (self._heads(project, hidden_states) for project in (self.k_proj, self.v_proj))
        if hasattr(self, "k_norm"):
            key = self.k_norm(key)
        return rotate(key, *rotary), value

    def _heads(self, project: nn.Module, x: Tensor) -> Tensor:
        return project(x).view(*x.shape[:2], -1, self.head_dim)


class FusedLayer(RoutedLayer):
    """A routed layer that computes the asked tokens alone behind its keys and values.

    Attributes:
        norm_before_mlp, norms_behind: Names of norms, as the family declares them.
    """

    input_layernorm: nn.Module
    self_attn: FusedAttention
    mlp: nn.Module
    norm_before_mlp: str
    norms_behind: Mapping[str, str]
    prunes = True

    def execute(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], attend: Attention) -> Tensor:
        """``layer(x)``, ``(B, T', D)`` of the asked tokens, from ``(B, T, D)``."""
        return self.add_mlp(self.add_attention(hidden_states, rotary, attend))

    def add_attention(
        self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], attend: Attention
    ) -> Tensor:
        """``x + attn(norm(x))``, ``(B, T', D)`` of the asked tokens, from ``(B, T, D)``."""
        attention = self.self_attn(self.input_layernorm(hidden_states), rotary, attend)
        return attend.asked(hidden_states) + self._normed("self_attn", attention)

    def add_mlp(self, hidden_states: Tensor) -> Tensor:
        """``y + mlp(norm(y))``, ``(B, T, D)`` from ``(B, T, D)``."""
        normed = getattr(self, self.norm_before_mlp)(hidden_states)
        return hidden_states + self._normed("mlp", self.mlp(normed))

    def _normed(self, block: str, output: Tensor) -> Tensor:
        """What joins the residual stream of a block's output, ``(B, T, D)`` from ``(B, T, D)``."""
        norm = self.norms_behind.get(block)
        return output if norm is None else getattr(self, norm)(output)

    def remember(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], attend: Packed) -> None:
        """Leave keys and values, of tokens ``(B, T, D)`` that skip the layer."""
        if attend.cache is not None:
            attend.leave(*self.self_attn.keys_values(self.input_layernorm(hidden_states), rotary))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Hugging Face's rotary embedding: heads ``(B, T, H, d)`` rotated by cosines and sines ``(1|B, T, d)``."""
    if cpu.ready(x, cos, sin) and x.shape[-1] % (2 * cpu.LANES) == 0:
        return cpu.rotate(x.contiguous(), cos.contiguous(), sin.contiguous())
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(2) + torch.cat((-second, first), -1) * sin.unsqueeze(2)


FASTER: dict[str, type[nn.Module]] = {"RMSNorm": FusedRMSNorm, "MLP": FusedMLP, "Attention": FusedAttention}
"""By what transformers calls a family's modules, behind the family's name."""
