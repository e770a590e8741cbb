"""LoRA folded into a model, one decoder layer after the other: beside the model, one layer is in float32."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from qtale_lightning.models.adapters import fold_lora
from qtale_lightning.models.modeling import RoutedForCausalLM
from qtale_lightning.models.routing import Routing
from qtale_lightning.module import QTALEModule
from qtale_lightning.quantization.calibration import first_calls

HEAD_ROWS = 8192  # of the vocabulary, in float32 at a time


@torch.no_grad()
def merge(module: QTALEModule, dtype: torch.dtype) -> tuple[RoutedForCausalLM, float]:
    """Fold LoRA in float32, and round each layer to ``dtype`` when it has been seen to compute the same.

    Tokens pass each layer, in float32, before and after it is folded, each time behind layers that were so, too.

    Args:
        module: Its model loaded and in evaluation mode; LoRA is gone afterwards.
        dtype: Of all weights but the routers', which stay in float32.

    Returns:
        The model, and the most by which folding moved a logit of a token, before rounding: the median over tokens,
        since some have states thousands of times as large as others' ("massive activations", arXiv 2402.17762), in
        which float32's own rounding reaches as far as 0.04. NaN where one is.
    """
    model = module.model
    tokens = torch.arange(2, 34, device=model.device)[None] % model.config.vocab_size
    calls = [_first_call(model, tokens) for _ in range(2)]
    before, after = (hidden for hidden, _ in calls)
    for layer in model.model.layers:
        _cast(layer, torch.float32)
        before = layer(before, **calls[0][1])
        fold_lora(layer)
        after = layer(after, **calls[1][1])
        _cast(layer, dtype)
    norm: Any = copy.deepcopy(model.model.norm).float()
    moved = norm(before), norm(after)
    drift = torch.zeros(tokens.shape[1])
    for rows in model.lm_head.weight.split(HEAD_ROWS):
        ours, theirs = (hidden @ rows.float().T for hidden in moved)
        drift = torch.maximum(drift, (ours - theirs).abs().amax((0, 2)).cpu())  # NaN stays NaN
    module.merge()
    _cast(model, dtype)
    return model, drift.median().item()


def _first_call(model: RoutedForCausalLM, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What the first layer is called with where all layers execute, in float32."""
    batch: Any = {"input_ids": tokens, "routing": Routing(threshold=0.0)}
    (hidden,), (arguments,) = first_calls(model, [batch])
    return _float32(hidden), {name: tree_map(_float32, value) for name, value in arguments.items()}


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _cast(part: Any, dtype: torch.dtype) -> None:
    for name, parameter in part.named_parameters():
        if "router." not in name:
            parameter.data = parameter.data.to(dtype)
