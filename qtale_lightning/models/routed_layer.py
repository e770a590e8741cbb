"""The routed decoder layer: one definition, y = w · layer(x) + (1 − w) · x, and two ways to execute it."""

from functools import cache
from typing import Any

from torch import Tensor, nn

from qtale_lightning.models.attention import Masked, Packed
from qtale_lightning.models.cache import RoutedCache
from qtale_lightning.models.packing import Packing
from qtale_lightning.models.router import Router
from qtale_lightning.models.routing import Routing


class RoutedLayer(nn.Module):
    """Mixed in before a transformers decoder layer's class, whose own forward computes ``layer(x)``.

    Masked execution computes every token and mixes; packed execution gathers the executing tokens, computes them
    alone and scatters them back. At the same decisions the two agree to floating-point noise.
    """

    router: Router | None
    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        routing: Routing,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: RoutedCache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states after the layer, ``(B, T, D)`` from ``(B, T, D)``.

        ``position_embeddings`` are ``(1|B, T, d)``.
        """
        gate = routing.decide(self.layer_idx, self.router, hidden_states)
        if routing.execution == "masked":
            plan = Masked(routing.attention_bias(hidden_states.dtype), None if self.router is None else gate)
            output = super().forward(
                hidden_states, position_embeddings=position_embeddings, plan=plan, **_plain(kwargs)
            )
            if self.router is None:
                return output
            weight = gate.to(output.dtype).unsqueeze(-1)
            return weight * output + (1 - weight) * hidden_states

        packing = Packing.of(gate)
        if packing.length == 0:  # nobody executes: the layer isn't called
            return hidden_states
        cache = past_key_values.layer(self.layer_idx) if past_key_values is not None else None
        output = super().forward(
            packing.gather(hidden_states),
            position_embeddings=tuple(
                packing.gather(x.expand(*hidden_states.shape[:2], -1)) for x in position_embeddings
            ),
            plan=Packed(packing, cache),
            **_plain(kwargs),
        )
        return packing.scatter(hidden_states, output)


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The layer's other arguments, without those that a routed layer answers itself."""
    return {k: v for k, v in kwargs.items() if k not in ("attention_mask", "position_ids", "use_cache")}


@cache
def routed_class(layer_class: type[nn.Module]) -> type[nn.Module]:
    """The routed version of a transformers decoder layer class, e.g. ``RoutedLlamaDecoderLayer``."""
    return type(f"Routed{layer_class.__name__}", (RoutedLayer, layer_class), {"__module__": __name__})


def attach_router(layer: nn.Module, index: int, router: Router | None) -> None:
    """Make a decoder layer routed in place: its parameters keep their names, and it gains a ``router`` child.

    Args:
        layer: A transformers decoder layer (called with hidden states first and ``position_embeddings``, returns a
            tensor).
        index: Its place in the model.
        router: None for a layer that always executes.
    """
    layer.__class__ = routed_class(type(layer))  # type: ignore[arg-type]  # classes are hashable
    layer.layer_idx = index  # type: ignore[assignment]
    layer.router = router  # type: ignore[assignment]
