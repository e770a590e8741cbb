"""D-LLM (Jiang et al., NeurIPS 2024): routers trained by straight-through Gumbel noise and a loss of the ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from qtale_lightning.routing.method import Budget, Method, Pass

if TYPE_CHECKING:
    from torch import Tensor


class DLLM(Method):
    """L = L_CE + λ1 · L_ratio.

    L_entropy is computed, and logged, though it has no weight: it shows how firmly routers decide.
    """

    name = "dllm"
    title = "D-LLM"
    decides = routers = theta = noisy = True
    at_half = "D-LLM's decision"
    weights: ClassVar[tuple[str, ...]] = ("lambda_ratio",)

    def sample(self, routing: Pass, layer: int) -> Tensor:
        """Straight-through Gumbel-softmax of the router's logits."""
        from qtale_lightning.routing.router import gumbel_gate

        return gumbel_gate(routing.logits[layer], routing.temperature, routing.noise)

    def losses(self, routing: Pass, layers: int, budget: Budget) -> dict[str, Tensor]:
        """``ratio`` and ``entropy``."""
        from qtale_lightning.losses import entropy_loss, predicting, ratio_loss

        counted = routing.free & predicting(routing.tokens)
        return {
            "ratio": ratio_loss(routing.stacked_shares(), layers, budget.target, counted, budget.held),
            "entropy": entropy_loss(routing.stacked_logits(), routing.free),
        }

    def statistics(self, routing: Pass) -> dict[str, Tensor]:
        """With ``flip_ratio``: decisions that Gumbel noise turned."""
        from qtale_lightning.routing.statistics import router_statistics

        return router_statistics(routing, "flip_ratio")


METHOD = DLLM()
