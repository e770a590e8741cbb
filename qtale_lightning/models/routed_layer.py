"""The routed decoder layer: one definition, y = w · layer(x) + (1 − w) · x, and two ways to execute it."""

from typing import Any

from torch import Tensor, nn

from qtale_lightning.models.attention import Attention, Masked, Packed
from qtale_lightning.models.cache import RoutedCache
from qtale_lightning.models.routing import Routing
from qtale_lightning.models.stand_in import StandIn
from qtale_lightning.routing.router import Router


class RoutedLayer(nn.Module):
    """What a family's decoder layer becomes with a router: a class of this one and of the layer's own, in that order.

    Parameters keep their names. The family's own forward runs unchanged, on the tokens that are computed, with their
    own rotary positions; only its attention is ours, by the name that `attention` registers with transformers.

    Masked execution computes every token and mixes; packed execution gathers the executing tokens, computes them
    alone and scatters them back. At the same decisions the two agree to floating-point noise.
    """

    router: Router | None
    stand_in: StandIn | None
    layer_idx: int
    unit: int
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
        if self.layer_idx < routing.resume:  # the pass began with the states behind it
            return hidden_states
        if self.layer_idx in routing.keep:
            routing.states[self.layer_idx] = hidden_states
        gate = routing.decide(self.unit, self.router, hidden_states)
        if routing.execution == "masked":
            bias = routing.attention_bias(hidden_states.dtype, self.window)
            if gate is routing.tokens:  # a layer that isn't decided about
                return self.execute(hidden_states, position_embeddings, Masked(bias, None))
            kept = None if routing.keep_kv else gate
            output = self.execute(hidden_states, position_embeddings, Masked(bias, kept))
            return mixed(gate, output, self.skip(hidden_states))

        asked = routing.asked if self.is_last and self.prunes else None
        present = gate  # tokens that leave keys and values
        if routing.keep_kv and gate is not routing.tokens:
            present, asked = routing.tokens, gate if asked is None else gate & asked
        packing = routing.packing(present)
        if packing.length == 0:  # nobody executes: the layer isn't computed
            return self.skip(hidden_states)
        cache = past_key_values.layer(self.layer_idx) if past_key_values is not None else None
        queries = routing.subset(present, packing, asked)
        if packing.index is not None:
            shape = hidden_states.shape[:2]
            cos, sin = (packing.gather(x.expand(*shape, -1)) for x in position_embeddings)
            position_embeddings = cos, sin
        visible, reach = routing.visible(packing, queries), routing.reach(self.window)
        attend = Packed(packing, cache, queries, visible, reach)
        if queries is not None and queries.packing.length == 0:  # nobody asks for more than keys and values
            self.remember(packing.gather(hidden_states), position_embeddings, attend)
            return self.skip(hidden_states)
        output = self.execute(packing.gather(hidden_states), position_embeddings, attend)
        executed = packing if queries is None else queries.packing
        return output if executed.index is None else executed.scatter(self.skip(hidden_states), output)

    def execute(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], attend: Attention) -> Tensor:
        """``layer(x)``: the family's own layer, ``(B, T, D)`` from ``(B, T, D)``, with an attention of our own."""
        return super().forward(hidden_states, position_embeddings=rotary, attend=attend)

    def skip(self, hidden_states: Tensor) -> Tensor:
        """What tokens that skip the layer have behind it, ``(B, T, D)`` from ``(B, T, D)``."""
        return hidden_states if self.stand_in is None else hidden_states + self.stand_in(hidden_states)

    def remember(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], attend: Packed) -> None:
        """Leave keys and values, of tokens ``(B, T, D)`` that skip the layer."""
        raise NotImplementedError(
            "keys and values of skipped tokens are kept by layers that compute them alone"
        )


def mixed(gate: Tensor, executed: Tensor, skipped: Tensor) -> Tensor:
    """w · executed + (1 − w) · skipped, of states ``(B, T, D)`` and decisions ``(B, T)``."""
    weight = gate.to(executed.dtype).unsqueeze(-1)
    return weight * executed + (1 - weight) * skipped


def attach_router(
    layer: nn.Module,
    routed: type[RoutedLayer],
    index: int,
    unit: int,
    router: Router | None,
    stand_in: StandIn | None = None,
    is_last: bool = False,
    window: int | None = None,
) -> None:
    """Make a decoder layer routed in place: its parameters keep their names, and it gains a ``router`` child.

    Args:
        layer: A transformers decoder layer.
        routed: What it becomes: a class of `RoutedLayer` and of its own.
        index: Its place in the model.
        unit: Number of what its router decides about.
        router: None for a layer that always executes.
        stand_in: For tokens that skip it; None: they are left as they are.
        is_last: Of the model: nothing but the head reads what it gives.
        window: Tokens that it attends to at most; None: all.
    """
    layer.__class__ = routed
    layer.layer_idx = index  # type: ignore[assignment]
    layer.unit = unit  # type: ignore[assignment]
    layer.router = router  # type: ignore[assignment]
    layer.stand_in = stand_in  # type: ignore[assignment]
    layer.is_last = is_last  # type: ignore[assignment]
    layer.window = window  # type: ignore[assignment]
