"""Small models for the comparisons: a Hugging Face LLaMA, and the same weights with routers that really disagree."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qtale_lightning.models import RoutedForCausalLM, route
from tests.llama import llama_config, mix_decisions
from tests.tolerance import depth

ARCHITECTURE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,  # grouped-query attention, as in every newer model
    "head_dim": 32,  # as small as the CPU's operations take it
    "initializer_range": 0.2,  # large enough for logits, and so routing decisions, that differ between tokens
}
TERMS = depth(LlamaConfig(**ARCHITECTURE))

MakeRouted = Callable[..., RoutedForCausalLM]


@pytest.fixture
def dense() -> LlamaForCausalLM:
    """Hugging Face's own LLaMA."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**ARCHITECTURE)).eval()


@pytest.fixture
def make_routed(dense: LlamaForCausalLM) -> MakeRouted:
    """The dense fixture's weights with random routers whose decisions at θ = 0.5 are mixed."""

    def make(start_layer: int = 1, reserved_tokens: int = 2) -> RoutedForCausalLM:
        config = llama_config(
            **ARCHITECTURE, router_width=16, start_layer=start_layer, reserved_tokens=reserved_tokens
        )
        torch.manual_seed(1)
        return mix_decisions(route(copy.deepcopy(dense), config))

    return make


@pytest.fixture
def routed(make_routed: MakeRouted) -> RoutedForCausalLM:
    """A routed model: the first layer always executes, two tokens are reserved."""
    return make_routed()
