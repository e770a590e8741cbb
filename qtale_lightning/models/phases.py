"""Precision that falls while a text is written (progressive mixed-precision decoding; Chen et al., ICLR 2025).

A schedule, `bits_schedule` of a generation configuration, says by how many tokens are written which precision computes
the next ones: `[[0, 4], [32, 3]]` are 4 bits for the prompt and until 32 tokens are written, then 3. A third number is
θ from there on. A model whose codes are nested computes all of them from the same memory.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from qtale_lightning.models.routing import Routing


class Phase(NamedTuple):
    """From how many written tokens on which precision computes, and with which θ; None: the call's."""

    tokens: int
    bits: int
    threshold: float | None


def read_schedule(schedule: Any) -> list[Phase]:
    """A schedule's phases.

    Args:
        schedule: [tokens, bits] or [tokens, bits, θ] each.

    Raises:
        ValueError: It isn't such a list, doesn't begin at 0, tokens don't rise, bits do, or a θ is no probability.
    """
    example = "give [tokens written, bits] by phase, such as [[0, 4], [32, 3]]"
    rows = schedule if isinstance(schedule, Sequence) and not isinstance(schedule, str) else []
    if not rows or not all(_is_phase(row) for row in rows):
        raise ValueError(f"bits_schedule {schedule!r} is no schedule: {example}")
    phases = [Phase(row[0], row[1], row[2] if len(row) == 3 else None) for row in rows]
    if phases[0].tokens != 0:
        raise ValueError(f"bits_schedule {schedule!r} says nothing of the first token: begin with [0, bits]")
    for before, after in pairwise(phases):
        if after.tokens <= before.tokens:
            raise ValueError(
                f"bits_schedule {schedule!r}: {after.tokens} tokens come after {before.tokens}, but numbers of tokens "
                "must rise"
            )
        if after.bits > before.bits:
            raise ValueError(
                f"bits_schedule {schedule!r} rises from {before.bits} to {after.bits} bits: precision can only fall "
                "while a text is written, since what was computed at less stays so"
            )
    return phases


def _is_phase(row: Any) -> bool:
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) not in (2, 3):
        return False
    whole = all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in row[:2])
    return whole and (len(row) == 2 or (isinstance(row[2], int | float) and 0 <= row[2] <= 1))


class Phases(LogitsProcessor):
    """Switches a model's precision as tokens are written; transformers asks it once a token, behind its logits."""

    def __init__(self, model: PreTrainedModel, phases: Sequence[Phase], routing: Routing) -> None:
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
                f"bits_schedule names a θ, and the model has none, by its method {model.config.method}"
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
                f"bits_schedule asks for {bits} bits of a model that isn't quantized: load a folder with nested codes "
                "(--quantize.engine nested)"
            )
        for linear in self.linears:
            try:
                linear.read_at(bits)
            except ValueError as error:
                raise ValueError(
                    f"bits_schedule: {error}. Load a folder with nested codes (--quantize.engine nested) without `bits`"
                ) from None
