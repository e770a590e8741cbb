"""The routed LLaMA: routers, routed layers, their two executions, cache, adapters and model sources."""

from qtale_lightning.models.cache import RoutedCache
from qtale_lightning.models.modeling import RoutedLlamaConfig, RoutedLlamaForCausalLM, RoutedLlamaModel, route
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
