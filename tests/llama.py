"""A routed LLaMA's configuration for tests, by the name that transformers knows it under."""

from typing import Any

from torch import nn
from transformers import AutoConfig

import qtale_lightning.models.families  # noqa: F401  # registers it
from qtale_lightning.models import RoutedConfig, RoutedForCausalLM


def llama_config(**options: Any) -> RoutedConfig:
    """Of LLaMA's own fields and the routers'."""
    return AutoConfig.for_model("routed_llama", **{k: v for k, v in options.items() if k != "model_type"})


def mix_decisions(model: RoutedForCausalLM) -> RoutedForCausalLM:
    """Make a model's routers random, in place, so that their decisions at θ = 0.5 are mixed; in evaluation mode."""
    for layer in model.model.layers:
        if layer.router is not None:
            nn.init.normal_(layer.router.out.weight, 0.0, 2.0)
            nn.init.zeros_(layer.router.out.bias)
    return model.eval()
