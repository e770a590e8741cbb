"""Small models whose routers disagree, their tokens and forced decisions; the same on every device."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from qtale_lightning.models import RoutedForCausalLM, route, routed_config

BATCH, LENGTH = 4, 24
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,  # logits, and so decisions, that differ between tokens
}


def dense(device: str, dtype: torch.dtype, layers: int = 6) -> LlamaForCausalLM:
    """Hugging Face's own."""
    torch.manual_seed(0)
    return _moved(LlamaForCausalLM(LlamaConfig(**ARCHITECTURE, num_hidden_layers=layers)), device, dtype)


def routed(device: str, dtype: torch.dtype) -> RoutedForCausalLM:
    """The same weights with routers; the first layer has none, two tokens are reserved."""
    base = dense("cpu", torch.float32)
    config = routed_config(base.config, router_width=64, start_layer=1)
    torch.manual_seed(1)
    model = route(copy.deepcopy(base), config)
    for layer in model.model.layers:
        if layer.router is not None:
            nn.init.normal_(layer.router.out.weight, 0.0, 2.0)
            nn.init.zeros_(layer.router.out.bias)
    return _moved(model, device, dtype)


Model = TypeVar("Model", bound=PreTrainedModel)


def _moved(model: Model, device: str, dtype: torch.dtype) -> Model:
    """As `from_pretrained` loads it: frequencies of positions stay in float32."""
    model = model.to(device, dtype).eval()  # type: ignore[arg-type]
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    return model


def tokens() -> Tensor:
    """``(B, T)``."""
    return torch.randint(1, 512, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))


def padding(side: str) -> Tensor:
    """Mask ``(B, T)`` of ragged sequences; "none" leaves them whole."""
    lengths, place = torch.tensor([LENGTH, 17, 6, 3])[:, None], torch.arange(LENGTH)
    if side == "none":
        return torch.ones(BATCH, LENGTH, dtype=torch.long)
    return (place < lengths if side == "right" else place >= LENGTH - lengths).long()


def gates(model: RoutedForCausalLM, share: float) -> dict[int, Tensor]:
    """Random decisions ``(B, T)`` by layer, on the CPU."""
    generator = torch.Generator().manual_seed(5)
    return {i: torch.rand(BATCH, LENGTH, generator=generator) < share for i in model.config.routed_layers}
