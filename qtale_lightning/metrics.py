"""Routing statistics: what was executed, and how firmly the routers decided."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from qtale_lightning.losses import binary_entropy
from qtale_lightning.models.router import EXECUTE, SKIP, execute_probability
from qtale_lightning.models.routing import Routing


class ExecutionRatio(Metric):
    """Share of layer executions over all real tokens, per layer; reserved tokens and layers without router included.

    So it is the share of the dense model's layer work that is done, not the routers' own rate.

    Args:
        layers: Number of the model's layers.
    """

    executed: Tensor
    tokens: Tensor
    full_state_update = False

    def __init__(self, layers: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layers = layers
        self.add_state("executed", torch.zeros(layers, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, routing: Routing) -> None:
        """Count a forward pass."""
        self.executed += routing.executed(self.layers)
        self.tokens += routing.tokens.sum()

    def compute(self) -> Tensor:
        """Ratio of each layer, ``(layers,)``; its mean is the model's."""
        return self.executed / self.tokens.clamp_min(1)


@torch.no_grad()
def router_statistics(routing: Routing) -> dict[str, Tensor]:
    """Of a forward pass's free decisions: mean entropy (nats), mean |logit gap|, and flip ratio.

    The flip ratio is the share of decisions that Gumbel noise turned: taken otherwise than at p(execute) ≥ 0.5.
    """
    logits, gates = routing.stacked_logits(), routing.stacked_gates()
    free = routing.free.expand(gates.shape)
    count = free.sum().clamp_min(1)
    values = {
        "entropy": binary_entropy(logits),
        "logit_gap": (logits[..., EXECUTE] - logits[..., SKIP]).abs(),
        "flip_ratio": ((execute_probability(logits) >= 0.5) != (gates > 0.5)).float(),
    }
    return {name: (value * free).sum() / count for name, value in values.items()}
