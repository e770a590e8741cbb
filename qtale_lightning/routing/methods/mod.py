"""Mixture-of-Depths (Raposo et al. 2024): each layer is executed by a fixed share of a sequence's tokens.

In training a layer is executed by the tokens of its sequence with the highest router scores, k of them. That looks at
tokens to come, so at inference a token executes iff its own score says that it would be among them, p(execute) ≥ 0.5,
which a binary cross-entropy has taught the router (the paper's section on sampling, its first way).

What differs from the paper, for a model that is pretrained:
- The paper multiplies a block's output by the router's score, which pretraining gets used to. Here the executing
  tokens' weight is 1 and its gradient that of p(execute) (straight-through), so that θ = 0 is the base model.
- That gradient reaches the router from skipping tokens, too, since masked execution computes them.
- Every layer from ``start_layer`` on is routed, not every other one, and reserved tokens always execute: what is
  compared with other methods is how tokens are chosen.
- k follows from the target ratio of all layers, instead of an eighth of the sequence.
- A router is D-LLM's (a hidden layer), not one linear map, for the same reason.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtale_lightning.routing.method import Budget, Method, Pass, fixed_rate

if TYPE_CHECKING:
    from torch import Tensor


class MixtureOfDepths(Method):
    """L = L_CE + λ · L_prediction, the cross-entropy of foreseeing who is among the k."""

    name = "mod"
    title = "MoD"
    decides = routers = theta = True
    at_half = "MoD's decision"
    weights = ("lambda_prediction",)

    def fields(self, layers: int, start_layer: int, target_ratio: float, seed: int) -> dict[str, Any]:
        """The capacity of a layer is ``rate`` of the free tokens."""
        rate = fixed_rate(target_ratio, layers, start_layer)
        return super().fields(layers, start_layer, target_ratio, seed) | {"rate": rate}

    def sample(self, routing: Pass, layer: int) -> Tensor:
        """The k with the highest scores of each sequence, with the gradient of p(execute)."""
        from qtale_lightning.routing.router import execute_probability

        probability = execute_probability(routing.logits[layer])
        chosen = top_tokens(routing.logits[layer], routing.free, routing.rate)
        return chosen.to(probability.dtype) + (probability - probability.detach())

    def losses(self, routing: Pass, layers: int, budget: Budget) -> dict[str, Tensor]:
        """``prediction``: in nats, of free tokens."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        from qtale_lightning.losses import sequence_mean
        from qtale_lightning.routing.router import logit_gap

        logits = routing.stacked_logits()
        chosen = top_tokens(logits, routing.free, routing.rate).float()
        nll = binary_cross_entropy_with_logits(logit_gap(logits), chosen, reduction="none")
        return {"prediction": sequence_mean(nll.mean(0), routing.free)}

    def statistics(self, routing: Pass) -> dict[str, Tensor]:
        """With ``prediction_error``: decisions that p(execute) ≥ 0.5 would take otherwise."""
        from qtale_lightning.routing.statistics import router_statistics

        return router_statistics(routing, "prediction_error")


def top_tokens(logits: Tensor, free: Tensor, rate: float | None) -> Tensor:
    """The free tokens with the highest scores of their sequence, bool ``(…, B, T)`` from logits ``(…, B, T, 2)``.

    They are ``rate`` of the sequence's, to the nearest whole number.
    """
    from qtale_lightning.routing.router import logit_gap

    assert rate is not None  # the model fills it in
    count = (rate * free.sum(-1, keepdim=True)).round()
    scores = logit_gap(logits).detach().masked_fill(~free, float("-inf"))
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < count) & free


METHOD = MixtureOfDepths()
