"""Rotary angles of decoded tokens."""

from typing import Any

import torch
from torch import Tensor

from qtale_lightning.watch import version_of

POSITIONS = 256
"""Whose rotations are made together."""

_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Transformers' rotary embeddings that give a position the same angles in every sequence."""


class Angles:
    """A rotary embedding's cosines and sines, made for a block of positions at a time: one alone takes as long."""

    def __init__(self, rotary: Any, like: Tensor) -> None:
        self.rotary, self.like = rotary, like
        # The block, frequencies that its angles were made from, and these: all at once, for threads that share a model.
        self.made: tuple[range, Any, Tensor, Tensor] = range(0), None, like, like

    def at(self, places: list[int]) -> tuple[Tensor, Tensor]:
        """Of tokens' places, one or B: ``(d)`` where they are one, else ``(B, 1, d)``."""
        place, *others = places
        fixed = getattr(self.rotary, "rope_type", None) in _FIXED_ROTATIONS
        if not fixed or any(other != place for other in others):
            return self.rotary(self.like, torch.tensor(places).unsqueeze(1))
        block, source, cos, sin = self.made
        now = self.rotary.inv_freq
        if place not in block or now is not source[0] or version_of(now) != source[1]:
            first = place - place % POSITIONS
            block, source = range(first, first + POSITIONS), (now, version_of(now))
            of_block = torch.arange(block.start, block.stop).unsqueeze(0)
            cos, sin = (angles[0] for angles in self.rotary(self.like, of_block))
            self.made = block, source, cos, sin
        return cos[place - block.start], sin[place - block.start]
