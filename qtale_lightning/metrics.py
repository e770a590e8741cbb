"""Routing statistics: what was executed, and how firmly the routers decided."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from qtale_lightning.models.routing import Routing, by_layer
from qtale_lightning.paths import PathDiversity
from qtale_lightning.routing.router import execute_probability, logit_gap


class ExecutionRatio(Metric):
    """Share of layer executions over all real tokens, per layer; reserved tokens and layers without router included.

    So it is the share of the dense model's layer work that is done, not the routers' own rate. Of a layer whose
    sublayers are decided about apart it is the share of its weights that are computed.

    Args:
        layers: Number of the model's layers.
        dropped: Layers of its base model that it was made without: none of them is executed.
        shares: Of a layer's units, as `architectures.unit_shares` gives them.
    """

    executed: Tensor
    tokens: Tensor
    full_state_update = False

    def __init__(
        self,
        layers: int,
        dropped: Sequence[int] | None = None,
        shares: Sequence[float] = (1.0,),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.layers, self.dropped, self.shares = layers, {*(dropped or ())}, shares
        executed = torch.zeros(layers * len(shares), dtype=torch.long)
        self.add_state("executed", executed, dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, routing: Routing) -> None:
        """Count a forward pass."""
        self.executed += routing.executed(len(self.executed))
        self.tokens += routing.tokens.sum()

    def compute(self) -> Tensor:
        """Ratio of each layer of the base model, ``(layers,)``; its mean is the model's."""
        ratios = by_layer(self.by_unit(), self.shares)
        if not self.dropped:
            return ratios
        kept, none = iter(ratios.unbind()), ratios.new_zeros(())
        layers = range(self.layers + len(self.dropped))
        return torch.stack([none if layer in self.dropped else next(kept) for layer in layers])

    def by_unit(self) -> Tensor:
        """Ratio of each unit of the model's layers, ``(layers · n,)``."""
        return self.executed / self.tokens.clamp_min(1)


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
    """What every validation records of decisions, over the real tokens that they are about.

    Paths are taken twice: as inference decides (p(execute) ≥ 0.5), and as Gumbel noise would decide at the same logits,
    that is, each layer with probability p(execute). The second leaves out that an earlier layer's other decision would
    move the later logits. A method without such noise, or without routers, has the parts that it can have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paths, self.noisy_paths = PathDiversity(), PathDiversity()
        self.logit_gap, self.probability = Histogram(-8.0, 8.0, 64), Histogram(0.0, 1.0, 20)

    def update(self, routing: Routing, seed: int) -> None:
        """Record a forward pass; nothing, for a model that decides nothing. ``seed`` is the noise's."""
        if not routing.gates:
            return
        self.paths.update(routing.stacked_gates()[:, routing.free] > 0.5)
        if not routing.logits:
            return
        logits = routing.stacked_logits()[:, routing.free]
        probability = execute_probability(logits)
        self.logit_gap.update(logit_gap(logits))
        self.probability.update(probability)
        if routing.method.noisy:
            noise = torch.Generator(logits.device).manual_seed(seed)
            self.noisy_paths.update(torch.bernoulli(probability, generator=noise) > 0.5)

    def compute(self) -> dict[str, dict[str, Any]]:
        """``paths`` and ``noisy_paths`` as `path_statistics`, ``logit_gap`` and ``probability`` as histograms.

        Over all processes, which must all call it; without what was never recorded.
        """
        paths = {"paths": self.paths, "noisy_paths": self.noisy_paths}
        counts = {"logit_gap": self.logit_gap, "probability": self.probability}
        found = {name: metric.compute() for name, metric in paths.items() if metric.update_called}
        return found | {name: metric.summary() for name, metric in counts.items() if metric.update_called}

    def reset(self) -> None:
        """Forget everything."""
        for metric in self.children():
            cast(Metric, metric).reset()


def path_logs(record: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The numbers of a record of `RoutingDiagnostics` that are curves over training: ``paths/distinct``, …"""
    kinds = [kind for kind in ("paths", "noisy_paths") if kind in record]
    return {f"{kind}/{name}": value for kind in kinds for name, value in record[kind].items()}
