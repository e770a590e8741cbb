"""A routed LLaMA's configuration for tests, by the name that transformers knows it under."""

from typing import Any

from torch import nn
from transformers import AutoConfig

import qtale_lightning.models.families  # noqa: F401  # registers it
from qtale_lightning.models import RoutedConfig, RoutedForCausalLM
from qtale_lightning.routing.router import Router


def llama_config(**options: Any) -> RoutedConfig:
    """Of LLaMA's own fields and the routers'."""
    return AutoConfig.for_model("routed_llama", **{k: v for k, v in options.items() if k != "model_type"})


def mix_decisions(model: RoutedForCausalLM) -> RoutedForCausalLM:
    """Make a model's routers random, in place, so that their decisions at θ = 0.5 are mixed; in evaluation mode."""
    for part in model.modules():
        if isinstance(part, Router):
            nn.init.normal_(part.out.weight, 0.0, 2.0)
            nn.init.zeros_(part.out.bias)
    return model.eval()
