"""Small routed models of each method, with the same weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qtale_lightning.models import RoutedForCausalLM, route
from tests.llama import llama_config, mix_decisions

ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}

Make = Callable[..., RoutedForCausalLM]


def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**ARCHITECTURE)).eval()


@pytest.fixture
def make() -> Make:
    """A model of a method, its routers' decisions mixed."""

    def made(method: str, **fields: Any) -> RoutedForCausalLM:
        options = {"router_width": 16, "start_layer": 1, "rate": 0.6} | fields
        return mix_decisions(route(dense(), llama_config(**ARCHITECTURE, method=method, **options)))

    return made
