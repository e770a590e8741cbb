"""Attaching routers to a Hugging Face model, in place: its weights keep their names and their storage."""

from functools import cache
from typing import Any

from torch import nn

from qtale_lightning.architectures import architecture_of, window
from qtale_lightning.models.attention import ATTENTION
from qtale_lightning.models.config import RoutedConfig
from qtale_lightning.models.fused import FASTER, FusedLayer, FusedRMSNorm
from qtale_lightning.models.linear import RoutedLinear
from qtale_lightning.models.routed_layer import RoutedLayer, attach_router
from qtale_lightning.models.stand_in import StandIn
from qtale_lightning.models.sublayers import SublayersLayer
from qtale_lightning.routing import method_of
from qtale_lightning.routing.router import Router


def attach_routers(model: Any, config: RoutedConfig) -> None:
    """Make the decoder layers of a family's causal language model routed ones, in place.

    Args:
        model: With `model.layers`; its modules get ``config``.
        config: Of its family, and of the routers.

    Raises:
        ValueError: The family isn't declared.
    """
    family = architecture_of(config)
    faster: dict[str, Any] = {
        family.causal_lm.replace("ForCausalLM", part): ours
        for part, ours in FASTER.items()
        if family.fused and not (family.norm_offset and ours is FusedRMSNorm)
    }
    units = len(config.unit_shares)
    routed = (SublayersLayer if units > 1 else FusedLayer) if family.fused else RoutedLayer
    config._attn_implementation = ATTENTION
    for index, layer in enumerate(model.model.layers):
        stand_in, weight = None, next(layer.parameters())
        routers: list[Router | None] = [None] * units
        if index in config.routed_layers and method_of(config.method).routers:
            routers = [Router(config.hidden_size, config.router_width).to(weight.device) for _ in routers]
        if index in config.routed_layers and config.stand_in_rank:
            stand_in = StandIn(config.hidden_size, config.stand_in_rank).to(weight)
        attach_router(
            layer,
            _made(routed, layer.__class__),
            index,
            index * units,
            routers[0],
            stand_in,
            is_last=index == config.num_hidden_layers - 1,
            window=window(config, index),
        )
        layer.norm_before_mlp, layer.norms_behind = family.norm_before_mlp, family.norms_behind
        if units > 1:
            layer.mlp.router = routers[1]
    for module in model.modules():
        kind: Any = type(module)
        if kind is nn.Linear:
            module.__class__ = RoutedLinear
        elif (ours := faster.get(kind.__name__)) is not None:
            module.__class__ = _made(ours, kind)
        if hasattr(module, "config"):
            module.config = config


@cache
def _made(ours: Any, kind: Any) -> Any:
    """A class of one of ours and of a family's own, named as that with "Routed" in front."""
    if issubclass(kind, ours):
        return kind
    return type(f"Routed{kind.__name__}", (ours, kind), {"__module__": __name__})
