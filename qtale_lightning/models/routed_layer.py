"""The routed decoder layer: one definition, y = w · layer(x) + (1 − w) · x, and two ways to execute it."""

from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from qtale_lightning.models.attention import Attention, Masked, Packed
from qtale_lightning.models.cache import RoutedCache
from qtale_lightning.models.fused import rotate
from qtale_lightning.models.router import Router
from qtale_lightning.models.routing import Routing


class RoutedLlamaAttention(LlamaAttention):
    """A LLaMA layer's projections around an attention of our own."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], attend: Attention
    ) -> Tensor:
        """Shape ``(B, T', D)`` of the tokens that ``attend`` is asked for, from ``(B, T, D)``.

        ``rotary`` holds cosines and sines, ``(1|B, T, d)``.
        """
        asked = attend.asked(hidden_states)
        query, key, value = (
            project(x).view(*x.shape[:2], -1, self.head_dim)
            for project, x in (
                (self.q_proj, asked),
                (self.k_proj, hidden_states),
                (self.v_proj, hidden_states),
            )
        )
        of_asked = rotary
        if asked is not hidden_states:
            cos, sin = (attend.asked(x.expand(*hidden_states.shape[:2], -1)) for x in rotary)
            of_asked = cos, sin
        query, key = rotate(query, *of_asked), rotate(key, *rotary)
        dropout = float(self.attention_dropout or 0.0) if self.training else 0.0
        return self.o_proj(attend(query, key, value, self.scaling, dropout).flatten(2))


class RoutedLlamaDecoderLayer(LlamaDecoderLayer):
    """A LLaMA layer with a router; parameters keep their names.

    Masked execution computes every token and mixes; packed execution gathers the executing tokens, computes them
    alone and scatters them back. At the same decisions the two agree to floating-point noise.
    """

    router: Router | None
    layer_idx: int
    is_last: bool

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        routing: Routing,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: RoutedCache | None = None,
        **_: Any,
    ) -> Tensor:
        """Hidden states after the layer, ``(B, T, D)`` from ``(B, T, D)``.

        ``position_embeddings`` are ``(1|B, T, d)``.
        """
        gate = routing.decide(self.layer_idx, self.router, hidden_states)
        if routing.execution == "masked":
            bias = routing.attention_bias(hidden_states.dtype)
            if self.router is None:
                return self.execute(hidden_states, position_embeddings, Masked(bias, None))
            output = self.execute(hidden_states, position_embeddings, Masked(bias, gate))
            weight = gate.to(output.dtype).unsqueeze(-1)
            return weight * output + (1 - weight) * hidden_states

        packing = routing.packing(gate)
        if packing.length == 0:  # nobody executes: the layer isn't computed
            return hidden_states
        cache = past_key_values.layer(self.layer_idx) if past_key_values is not None else None
        queries = routing.subset(gate, packing, self.is_last)
        if packing.index is not None:
            shape = hidden_states.shape[:2]
            cos, sin = (packing.gather(x.expand(*shape, -1)) for x in position_embeddings)
            position_embeddings = cos, sin
        attend = Packed(packing, cache, queries, routing.visible(packing, queries))
        output = self.execute(packing.gather(hidden_states), position_embeddings, attend)
        return (packing if queries is None else queries.packing).scatter(hidden_states, output)

    def execute(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], attend: Attention) -> Tensor:
        """``layer(x)``: Hugging Face's LLaMA layer, ``(B, T, D)`` from ``(B, T, D)``, with an attention of our own."""
        attention = self.self_attn(self.input_layernorm(hidden_states), rotary, attend)
        hidden_states = attend.asked(hidden_states) + attention
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def attach_router(layer: nn.Module, index: int, router: Router | None, is_last: bool = False) -> None:
    """Make a decoder layer routed in place: its parameters keep their names, and it gains a ``router`` child.

    Args:
        layer: A transformers LLaMA layer.
        index: Its place in the model.
        router: None for a layer that always executes.
        is_last: Of the model: nothing but the head reads what it gives.
    """
    layer.__class__, layer.self_attn.__class__ = RoutedLlamaDecoderLayer, RoutedLlamaAttention
    layer.layer_idx = index  # type: ignore[assignment]
    layer.router = router  # type: ignore[assignment]
    layer.is_last = is_last  # type: ignore[assignment]
