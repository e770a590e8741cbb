"""The routed LLaMA: routers, routed layers, their two executions, cache, adapters and model sources."""

from typing import TYPE_CHECKING

from qtale_lightning.lazy import lazily

if TYPE_CHECKING:
    from qtale_lightning.models.cache import RoutedCache
    from qtale_lightning.models.modeling import (
        RoutedLlamaConfig,
        RoutedLlamaForCausalLM,
        RoutedLlamaModel,
        route,
    )
    from qtale_lightning.models.router import Router
    from qtale_lightning.models.routing import Routing

__all__ = [
    "RoutedCache",
    "RoutedLlamaConfig",
    "RoutedLlamaForCausalLM",
    "RoutedLlamaModel",
    "Router",
    "Routing",
    "route",
]

__getattr__ = lazily(
    __name__,
    {
        f"{__name__}.cache": ["RoutedCache"],
        f"{__name__}.modeling": ["RoutedLlamaConfig", "RoutedLlamaForCausalLM", "RoutedLlamaModel", "route"],
        f"{__name__}.router": ["Router"],
        f"{__name__}.routing": ["Routing"],
    },
)
