"""Small models with a few loud channels, calibration rows, and what applies a recipe in float32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qtale_lightning.models import RoutedForCausalLM, route
from qtale_lightning.quantization import awq
from qtale_lightning.quantization.mappings import decoder_layers, linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import Recipe, quantized_weight, scale_vectors
from tests.llama import llama_config, mix_decisions

MakeModel = Callable[..., LlamaForCausalLM]
MakeRouted = Callable[..., RoutedForCausalLM]
Search = Callable[..., Recipe]
Apply = Callable[[nn.Module, Recipe], None]

GROUP = 16
VOCABULARY = 96


def architecture(kv_heads: int, layers: int, bias: bool) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "attention_bias": bias,
        "mlp_bias": bias,
    }


def build(kv_heads: int = 4, layers: int = 2, bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**architecture(kv_heads, layers, bias))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:  # as trained models have
                parameter[torch.randperm(64)[:4]] = 12.0
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """Hugging Face's own LLaMA: `make_model(kv_heads, layers, bias)`, the same weights at every call."""
    return build


@pytest.fixture(scope="session")
def make_routed() -> MakeRouted:
    """The same with random routers, `make_routed(kv_heads, start_layer, reserved_tokens, …)`; of three layers."""

    def make(
        kv_heads: int = 4, start_layer: int = 1, reserved_tokens: int = 2, **routing: Any
    ) -> RoutedForCausalLM:
        config = llama_config(
            **architecture(kv_heads, 3, bias=False),
            router_width=16,
            start_layer=start_layer,
            reserved_tokens=reserved_tokens,
            **routing,
        )
        model = route(build(kv_heads, 3), config)
        torch.manual_seed(1)
        return mix_decisions(model)

    return make


@pytest.fixture(scope="session")
def rows() -> Tensor:
    return torch.randint(VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def search() -> Search:
    """AWQ's search at one width, `search(model, rows, bits)`, in groups of 16."""

    def run(model: LlamaForCausalLM, rows: Tensor, bits: int = 4, **options: Any) -> Recipe:
        precision = uniform(linear_shapes(model), bits, {})
        return awq.search(model, [{"input_ids": rows}], [precision], GROUP, **options)[0]

    return run


@pytest.fixture(scope="session")
def apply() -> Apply:
    """Gives a model, in place, the float32 values that a recipe's codes stand for."""

    @torch.no_grad()
    def run(model: nn.Module, recipe: Recipe) -> None:
        for layer in decoder_layers(model):
            for name, linear in layer.linears.items():
                codes, scales, zeros = quantized_weight(layer, name, recipe)
                linear.weight.copy_(((codes - zeros) * scales).flatten(-2))
            scale_vectors(layer, recipe)

    return run
