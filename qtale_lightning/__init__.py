"""QTALE: token-adaptive layer execution that survives weight quantization, as a PyTorch Lightning suite.

Importing the package registers the routed LLaMA and its packed weights with transformers, so that
``AutoModelForCausalLM.from_pretrained("<run>/model")`` loads an exported run.
"""

import qtale_lightning.quantization.checkpoint  # registers packed weights with transformers  # noqa: F401
from qtale_lightning.models import RoutedLlamaConfig, RoutedLlamaForCausalLM, Routing

__version__ = "0.1.0"

__all__ = ["RoutedLlamaConfig", "RoutedLlamaForCausalLM", "Routing", "__version__"]
