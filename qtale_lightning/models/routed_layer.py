"""The routed decoder layer: one definition, y = w · layer(x) + (1 − w) · x, and two ways to execute it."""

from typing import Any

from torch import Tensor, nn

from qtale_lightning.models.attention import Attention, Masked, Packed
from qtale_lightning.models.cache import RoutedCache
from qtale_lightning.models.routing import Routing
from qtale_lightning.routing.router import Router


class RoutedLayer(nn.Module):
    """What a family's decoder layer becomes with a router: a class of this one and of the layer's own, in that order.

    Parameters keep their names. The family's own forward runs unchanged, on the tokens that are computed, with their
    own rotary positions; only its attention is ours, by the name that `attention` registers with transformers.

    Masked execution computes every token and mixes; packed execution gathers the executing tokens, computes them
    alone and scatters them back. At the same decisions the two agree to floating-point noise.
    """

    router: Router | None
    layer_idx: int
    is_last: bool
    window: int | None

    prunes = False
    """Whether `execute` computes those tokens alone that its attention is asked for."""

    def forward(
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
            bias = routing.attention_bias(hidden_states.dtype, self.window)
            if gate is routing.tokens:  # a layer that isn't decided about
                return self.execute(hidden_states, position_embeddings, Masked(bias, None))
            output = self.execute(hidden_states, position_embeddings, Masked(bias, gate))
            weight = gate.to(output.dtype).unsqueeze(-1)
            return weight * output + (1 - weight) * hidden_states

        packing = routing.packing(gate)
        if packing.length == 0:  # nobody executes: the layer isn't computed
            return hidden_states
        cache = past_key_values.layer(self.layer_idx) if past_key_values is not None else None
        queries = routing.subset(gate, packing, self.is_last and self.prunes)
        if packing.index is not None:
            shape = hidden_states.shape[:2]
            cos, sin = (packing.gather(x.expand(*shape, -1)) for x in position_embeddings)
            position_embeddings = cos, sin
        visible, reach = routing.visible(packing, queries), routing.reach(self.window)
        attend = Packed(packing, cache, queries, visible, reach)
        output = self.execute(packing.gather(hidden_states), position_embeddings, attend)
        return (packing if queries is None else queries.packing).scatter(hidden_states, output)

    def execute(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], attend: Attention) -> Tensor:
        """``layer(x)``: the family's own layer, ``(B, T, D)`` from ``(B, T, D)``, with an attention of our own."""
        return super().forward(hidden_states, position_embeddings=rotary, attend=attend)


def attach_router(
    layer: nn.Module,
    routed: type[RoutedLayer],
    index: int,
    router: Router | None,
    is_last: bool = False,
    window: int | None = None,
) -> None:
    """Make a decoder layer routed in place: its parameters keep their names, and it gains a ``router`` child.

    Args:
        layer: A transformers decoder layer.
        routed: What it becomes: a class of `RoutedLayer` and of its own.
        index: Its place in the model.
        router: None for a layer that always executes.
        is_last: Of the model: nothing but the head reads what it gives.
        window: Tokens that it attends to at most; None: all.
    """
    layer.__class__ = routed
    layer.layer_idx = index  # type: ignore[assignment]
    layer.router = router  # type: ignore[assignment]
    layer.is_last = is_last  # type: ignore[assignment]
    layer.window = window  # type: ignore[assignment]
