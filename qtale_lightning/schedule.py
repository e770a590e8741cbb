"""How long a training is, and when it validates: from numbers alone, as Lightning's Trainer counts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The length of a training.

    The last batch of an epoch ends a step, though fewer than ``accumulate`` batches were accumulated.

    Args:
        epoch: Batches of one device in an epoch, at least 1.
        accumulate: Batches of a step, at least 1.
        max_steps: Optimizer steps; -1 leaves the length to ``max_epochs``.
        max_epochs: Epochs; None or -1 leaves the length to ``max_steps``. Of both, what is reached first.
    """

    epoch: int
    accumulate: int
    max_steps: int
    max_epochs: int | None

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.epoch // self.accumulate)

    @property
    def steps(self) -> int:
        """Optimizer steps of the training."""
        limits = [self.max_steps] if self.max_steps > 0 else []
        if self.max_epochs is not None and self.max_epochs > 0:
            limits.append(self.max_epochs * self.epoch_steps)
        return min(limits)

    @property
    def batches(self) -> int:
        """Batches of one device in the training."""
        epochs, steps = divmod(self.steps, self.epoch_steps)
        return epochs * self.epoch + steps * self.accumulate

    def interval(self, validations: int) -> int:
        """Batches from one validation to the next, so that there are so many: at least 1."""
        return max(1, self.batches // validations)
