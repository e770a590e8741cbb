"""A routed LLaMA's configuration for tests, by the name that transformers knows it under."""

from typing import Any

from transformers import AutoConfig

import qtale_lightning.models.families  # noqa: F401  # registers it
from qtale_lightning.models import RoutedConfig


def llama_config(**options: Any) -> RoutedConfig:
    """Of LLaMA's own fields and the routers'."""
    return AutoConfig.for_model("routed_llama", **{k: v for k, v in options.items() if k != "model_type"})
