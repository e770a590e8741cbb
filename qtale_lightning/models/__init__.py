"""The routed model: routers, routed layers, their two executions, cache, adapters and model sources."""

from typing import TYPE_CHECKING

from qtale_lightning.lazy import lazily

if TYPE_CHECKING:
    from qtale_lightning.models.cache import RoutedCache
    from qtale_lightning.models.config import RoutedConfig
    from qtale_lightning.models.families import route, routed_config
    from qtale_lightning.models.modeling import RoutedForCausalLM, RoutedModel
    from qtale_lightning.models.routing import Routing
    from qtale_lightning.routing.router import Router

__all__ = [
    "RoutedCache",
    "RoutedConfig",
    "RoutedForCausalLM",
    "RoutedModel",
    "Router",
    "Routing",
    "route",
    "routed_config",
]

__getattr__ = lazily(
    __name__,
    {
        f"{__name__}.cache": ["RoutedCache"],
        f"{__name__}.config": ["RoutedConfig"],
        f"{__name__}.families": ["route", "routed_config"],
        f"{__name__}.modeling": ["RoutedForCausalLM", "RoutedModel"],
        "qtale_lightning.routing.router": ["Router"],
        f"{__name__}.routing": ["Routing"],
    },
)
