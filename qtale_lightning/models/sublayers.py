"""A routed layer whose attention and MLP are decided about apart, each as a whole layer is elsewhere.

y = w · (x + attn(norm(x))) + (1 − w) · x by the layer's router, then the same with the MLP, of y, by the MLP's own
(SkipGPT, arXiv 2506.04179; GateSkip, arXiv 2510.13876). A token may do one without the other.
"""

from typing import Any

from torch import Tensor

from qtale_lightning.models.attention import Attention
from qtale_lightning.models.fused import FusedLayer
from qtale_lightning.models.routed_layer import mixed
from qtale_lightning.models.routing import Routing
from qtale_lightning.routing.router import Router


class SublayersLayer(FusedLayer):
    """Its router, and all that a routed layer does, are the attention's; the MLP follows, with a ``router`` child."""

    # The MLP's router reads what attention gives of all tokens, also in a last layer that is asked for some.
    prunes = False

    def forward(self, hidden_states: Tensor, routing: Routing, *args: Any, **options: Any) -> Tensor:
        """Hidden states after the layer, ``(B, T, D)`` from ``(B, T, D)``."""
        hidden_states = super().forward(hidden_states, routing, *args, **options)
        return hidden_states if self.layer_idx < routing.resume else self._decide_mlp(hidden_states, routing)

    def execute(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], attend: Attention) -> Tensor:
        """``x + attn(norm(x))``, ``(B, T, D)`` from ``(B, T, D)``."""
        return self.add_attention(hidden_states, rotary, attend)

    def _decide_mlp(self, hidden_states: Tensor, routing: Routing) -> Tensor:
        router: Router | None = self.mlp.router  # type: ignore[assignment]
        gate = routing.decide(self.unit + 1, router, hidden_states)
        if routing.execution == "masked":
            output = self.add_mlp(hidden_states)
            return output if gate is routing.tokens else mixed(gate, output, hidden_states)
        executing = gate & routing.asked if self.is_last and routing.asked is not None else gate
        packing = routing.packing(executing)
        if packing.length == 0:
            return hidden_states
        return packing.scatter(hidden_states, self.add_mlp(packing.gather(hidden_states)))
