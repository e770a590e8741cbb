"""What `plan` says of memory, held to what small models really keep for the backward pass, and to a packed model."""

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qtale_lightning.memory import activation_bytes
from qtale_lightning.models.routing import Routing
from qtale_lightning.module import QTALEModule

BATCH = 2
QKV = ["q_proj", "k_proj", "v_proj"]


def kept(
    layers: int, length: int, width: int, heads: int, router_width: int, lora_targets: Sequence[str] = QKV
) -> tuple[float, QTALEModule]:
    """Bytes beside the weights that a batch's losses leave for the backward pass, and the module."""
    torch.manual_seed(0)
    shape = {"vocab_size": 768, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": layers}
    base = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=heads))
    module = QTALEModule(
        name="tiny", train_all=False, router_width=router_width, start_layer=0, lora_targets=lora_targets
    )
    module.attach(base.to(torch.bfloat16) if width == 2 else base)
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    ids = torch.randint(5, 768, (BATCH, length))
    labels = ids.where(torch.arange(length) >= length - 2, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    seen: dict[int, int] = {}
    alive: list[Tensor] = []  # else another tensor could lie where one was

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    low = torch.autocast("cpu", torch.bfloat16) if width == 2 else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), low:
        module.losses(batch, Routing(), 0.5)
    return sum(seen.values()), module


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize(
    ("length", "heads", "router_width", "targets"),
    [
        (32, 4, 64, QKV),
        (96, 8, 64, [*QKV, "o_proj"]),
        (48, 2, 256, [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_a_layers_activations(
    width: int, length: int, heads: int, router_width: int, targets: Sequence[str]
) -> None:
    """Two layers more, so that what no layer keeps isn't counted; norms' numbers of a token are left out."""
    (fewer, _), (more, module) = (kept(n, length, width, heads, router_width, targets) for n in (2, 4))
    config = module.model.config
    planned = activation_bytes(config, length, width, module.lora_options) / config.num_hidden_layers
    measured = (more - fewer) / 2 / (BATCH * length)
    assert 0.98 * measured <= planned <= 1.02 * measured


def test_models_without_routers_have_no_routers_activations() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain = SimpleNamespace(**sizes, router_width=None, start_layer=0, method="full", model_type="llama")
    routed = SimpleNamespace(**sizes, router_width=32, start_layer=0, method="qtale", model_type="llama")
    more = activation_bytes(routed, 8, 4, {}) - activation_bytes(plain, 8, 4, {})
    assert more == 2 * 16 * 32
