"""Precision that falls while a text is written (progressive mixed-precision decoding; Chen et al., ICLR 2025).

By a schedule, `bits_schedule` of a generation configuration (see `qtale_lightning.bits_schedule`). A model whose codes
are nested computes all of its precisions from the same memory.
"""

from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from qtale_lightning.bits_schedule import Phase, Schedule
from qtale_lightning.models.routing import Routing


class Phases(LogitsProcessor):
    """Switches a model's precision as tokens are written; transformers asks it once a token, behind its logits."""

    def __init__(self, model: PreTrainedModel, phases: Schedule, routing: Routing) -> None:
        """Begins with the first phase.

        Args:
            routing: Of the call, whose θ changes with the phases.

        Raises:
            ValueError: The model doesn't hold a precision, or has no θ to change.
        """
        self.model, self.phases, self.routing, self.written = model, phases, routing, 0
        self.linears: list[Any] = [part for part in model.modules() if hasattr(part, "read_at")]
        self.threshold = routing.threshold
        if any(phase.threshold is not None for phase in phases) and not model.config.has_theta:
            raise ValueError(
                f"the schedule {phases} names a θ, and the model has none, by its method {model.config.method}"
            )
        for bits in dict.fromkeys(phase.bits for phase in reversed(phases)):  # the first one last
            self._read_at(bits)
        self._begin(phases[0])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores as they are; the next token's phase begins."""
        self.written += 1
        for phase in self.phases:
            if phase.tokens == self.written:
                self._begin(phase)
        return scores

    def end(self) -> None:
        """The model as it was loaded."""
        self.routing.threshold = self.threshold
        for linear in self.linears:
            linear.read_at(linear.bits)

    def _begin(self, phase: Phase) -> None:
        if phase.threshold is not None:
            self.routing.threshold = phase.threshold
        self._read_at(phase.bits)

    def _read_at(self, bits: int) -> None:
        if not self.linears:
            raise ValueError(
                f"the schedule asks for {bits} bits of a model that isn't quantized: load a folder with nested codes "
                "(--quantize.engine nested)"
            )
        for linear in self.linears:
            try:
                linear.read_at(bits)
            except ValueError as error:
                raise ValueError(
                    f"the schedule {self.phases}: {error}. Load a folder with nested codes (--quantize.engine nested) "
                    "without `bits`"
                ) from None
