"""The ratio as a constraint instead of a penalty: its multiplier is learned by dual ascent, so there is no λ1 to tune.

    L = L_CE + μ · (mean execution − R_target),    μ ← max(0, μ + rate · (mean execution − R_target)) after each step

The Lagrangian of "execute R_target of the layers on average, at most", descended in the weights and ascended in μ
(as Neural Networks with Quantization Constraints, arXiv 2210.15623, does for other constraints).
"""

import torch
from torch import Tensor


class Multiplier:
    """μ: begins at 0, rises while more is executed than the target allows, falls while less is.

    Attributes:
        rate: Of the ascent, a step; 0: there is no constraint.
        value: μ.
    """

    def __init__(self, rate: float) -> None:
        self.rate, self.value = rate, 0.0
        self._excess: list[Tensor] = []  # of this device's micro-batches of the step

    def __bool__(self) -> bool:
        """Whether there is a constraint."""
        return self.rate > 0

    @property
    def observed(self) -> bool:
        """Whether there is something to ascend by."""
        return bool(self._excess)

    def observe(self, excess: Tensor) -> None:
        """Note mean execution − R_target of a micro-batch, a scalar."""
        self._excess.append(excess.detach())

    def excess(self) -> Tensor:
        """The mean of what was noted since this was last asked."""
        mean = torch.stack(self._excess).mean()
        self._excess.clear()
        return mean

    def ascend(self, excess: float) -> None:
        """One step of the ascent, by the excess of all devices."""
        self.value = max(0.0, self.value + self.rate * excess)
