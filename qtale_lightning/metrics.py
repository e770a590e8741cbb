"""Routing statistics: what was executed, and how firmly the routers decided."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from qtale_lightning.losses import binary_entropy
from qtale_lightning.models.router import EXECUTE, SKIP, execute_probability
from qtale_lightning.models.routing import Routing
from qtale_lightning.paths import PathDiversity


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
    """Of a forward pass's free decisions: mean entropy (nats), mean |logit gap|, flip ratio, and that of each layer.

    The flip ratio is the share of decisions that Gumbel noise turned: taken otherwise than at p(execute) ≥ 0.5. That of
    routed layer i is ``flip_ratio_layer_i``, in two digits.
    """
    logits, gates = routing.stacked_logits(), routing.stacked_gates()
    values = {
        "entropy": binary_entropy(logits),
        "logit_gap": logit_gap(logits).abs(),
        "flip_ratio": ((execute_probability(logits) >= 0.5) != (gates > 0.5)).float(),
    }
    count = routing.free.sum().clamp_min(1)
    by_layer = {name: (value * routing.free).sum((1, 2)) / count for name, value in values.items()}
    flips = zip(sorted(routing.gates), by_layer["flip_ratio"], strict=True)
    return {name: value.mean() for name, value in by_layer.items()} | {
        f"flip_ratio_layer_{layer:02d}": ratio for layer, ratio in flips
    }


def logit_gap(logits: Tensor) -> Tensor:
    """execute − skip, ``(...)`` from logits ``(..., 2)``: the log-odds of p(execute)."""
    return logits[..., EXECUTE] - logits[..., SKIP]


class Histogram(Metric):
    """How many values fall into equal bins from ``low`` to ``high``; the outer bins hold what lies beyond, too."""

    counts: Tensor
    full_state_update = False

    def __init__(self, low: float, high: float, bins: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.low, self.high, self.bins = low, high, bins
        self.add_state("counts", torch.zeros(bins, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Count values of any shape."""
        places = ((values - self.low) * (self.bins / (self.high - self.low))).floor().long()
        self.counts += torch.bincount(places.clamp(0, self.bins - 1).flatten(), minlength=self.bins)

    def compute(self) -> Tensor:
        """Counts, ``(bins,)`` int64."""
        return self.counts

    def summary(self) -> dict[str, list[float]]:
        """``counts`` of length bins, and the bins' ``edges``, one more."""
        width = (self.high - self.low) / self.bins
        edges = [round(self.low + width * i, 6) for i in range(self.bins + 1)]
        return {"edges": edges, "counts": self.compute().tolist()}


class RoutingDiagnostics(nn.Module):
    """What every validation records of the routers, over the real tokens that they decide about.

    Paths are taken twice: as inference decides (p(execute) ≥ 0.5), and as Gumbel noise would decide at the same logits,
    that is, each layer with probability p(execute). The second leaves out that an earlier layer's other decision would
    move the later logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paths, self.noisy_paths = PathDiversity(), PathDiversity()
        self.logit_gap, self.probability = Histogram(-8.0, 8.0, 64), Histogram(0.0, 1.0, 20)

    def update(self, routing: Routing, seed: int) -> None:
        """Record a forward pass; nothing, for a model without routers. ``seed`` is the noise's."""
        if not routing.gates:
            return
        logits = routing.stacked_logits()[:, routing.free]
        probability = execute_probability(logits)
        noise = torch.Generator(logits.device).manual_seed(seed)
        self.paths.update(routing.stacked_gates()[:, routing.free] > 0.5)
        self.noisy_paths.update(torch.bernoulli(probability, generator=noise) > 0.5)
        self.logit_gap.update(logit_gap(logits))
        self.probability.update(probability)

    def compute(self) -> dict[str, dict[str, Any]]:
        """``paths`` and ``noisy_paths`` as `path_statistics`, ``logit_gap`` and ``probability`` as histograms.

        Over all processes, which must all call it; empty for a model without routers.
        """
        if not self.paths.update_called:
            return {}
        return {
            "paths": self.paths.compute(),
            "noisy_paths": self.noisy_paths.compute(),
            "logit_gap": self.logit_gap.summary(),
            "probability": self.probability.summary(),
        }

    def reset(self) -> None:
        """Forget everything."""
        for metric in self.children():
            cast(Metric, metric).reset()


def path_logs(record: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The numbers of a record of `RoutingDiagnostics` that are curves over training: ``paths/distinct``, …"""
    kinds = [kind for kind in ("paths", "noisy_paths") if kind in record]
    return {f"{kind}/{name}": value for kind in kinds for name, value in record[kind].items()}
