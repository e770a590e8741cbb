"""What training logs of decisions: means over the tokens that are decided about."""

from __future__ import annotations

import torch
from torch import Tensor

from qtale_lightning.losses import binary_entropy
from qtale_lightning.routing.method import Pass
from qtale_lightning.routing.router import execute_probability, logit_gap


@torch.no_grad()
def router_statistics(routing: Pass, turned: str) -> dict[str, Tensor]:
    """Of a forward pass's free decisions: mean entropy (nats), mean |logit gap|, and how many were turned.

    Turned are those that were taken otherwise than at p(execute) ≥ 0.5: their share is called ``turned``, and that of
    routed layer i, of all decisions about it, ``<turned>_layer_i``, in two digits.
    """
    logits, gates = routing.stacked_logits(), routing.stacked_gates()
    values = {
        "entropy": binary_entropy(logits),
        "logit_gap": logit_gap(logits).abs(),
        turned: ((execute_probability(logits) >= 0.5) != (gates > 0.5)).float(),
    }
    count = routing.free.sum().clamp_min(1)
    by_unit = {name: (value * routing.free).sum((1, 2)) / count for name, value in values.items()}
    units = len(routing.shares)
    layers = [unit // units for unit in sorted(routing.gates)[::units]]
    by_layer = by_unit[turned].unflatten(0, (-1, units)).mean(1)
    return {name: value.mean() for name, value in by_unit.items()} | {
        f"{turned}_layer_{layer:02d}": ratio for layer, ratio in zip(layers, by_layer, strict=True)
    }
