"""Gathering the executing tokens of a batch, and the compact rows in which they attend."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the executing tokens of a ``(B, T)`` batch go.

    They are flat, ``(1, N)``, for projections and in rows, ``(B, L)``, for attention. Rows keep the tokens' order
    and are left-aligned, so a causal mask alone is right for all of them; L is the largest number of executing
    tokens in a sequence.

    Attributes:
        index: Flat positions of executing tokens in the batch, ``(N,)``; None when every token executes.
        row, slot: Their sequence and their place in it, ``(N,)``.
        counts: Executing tokens of each sequence, ``(B,)``.
        length: L.
        uniform: All counts are equal, so that rows are a view of the flat tokens.
    """

    index: Tensor | None
    row: Tensor
    slot: Tensor
    counts: Tensor
    length: int
    uniform: bool

    @classmethod
    def of(cls, executing: Tensor) -> "Packing":
        """The packing of decisions, bool ``(B, T)``."""
        _, length = executing.shape
        counts = executing.sum(1)
        longest, shortest = (int(value) for value in torch.stack([counts.max(), counts.min()]).tolist())
        if shortest == length:
            empty = counts.new_empty(0)
            return cls(None, empty, empty, counts, length, uniform=True)
        index = executing.flatten().nonzero().squeeze(1)
        row = index // length
        slot = (executing.cumsum(1) - 1).flatten()[index]
        return cls(index, row, slot, counts, longest, uniform=longest == shortest)

    def gather(self, x: Tensor) -> Tensor:
        """Executing tokens of ``(B, T, …)`` as ``(1, N, …)``; the tensor itself when every token executes."""
        return x if self.index is None else x.flatten(0, 1)[self.index].unsqueeze(0)

    def scatter(self, x: Tensor, packed: Tensor) -> Tensor:
        """``x (B, T, …)`` with its executing tokens replaced by ``packed (1, N, …)``."""
        if self.index is None:
            return packed
        return x.flatten(0, 1).index_copy(0, self.index, packed.squeeze(0)).view_as(x)

    def to_rows(self, x: Tensor) -> Tensor:
        """Heads of flat tokens ``(1, H, N, d)`` as rows ``(B, H, L, d)``; unused slots are zero."""
        if self.index is None:
            return x
        batch, (_, heads, _, width) = len(self.counts), x.shape
        tokens = x.squeeze(0).transpose(0, 1)
        if self.uniform:
            return tokens.reshape(batch, self.length, heads, width).transpose(1, 2)
        rows = x.new_zeros(batch, self.length, heads, width)
        rows[self.row, self.slot] = tokens
        return rows.transpose(1, 2)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Rows ``(B, L, H, d)`` as flat tokens ``(1, N, H, d)``."""
        if self.index is None:
            return rows
        return rows.flatten(0, 1).unsqueeze(0) if self.uniform else rows[self.row, self.slot].unsqueeze(0)
