"""Gathering the executing tokens of a batch, the compact rows in which they attend, and those that are asked for."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtale_lightning import cpu


def _up_to_round(count: int) -> int:
    """How many are missing to the next round number; none where bfloat16's products are ours: theirs are oneDNN's."""
    return -count % (1 if count <= cpu.few_tokens() else 16 if count <= 128 else 32)


def compact(chosen: Tensor, count: int) -> Tensor:
    """Places of the true ones, ``(count,)`` int64, of bool ``(n,)``: as `nonzero`, which would wait for the device."""
    place = torch.arange(len(chosen), device=chosen.device)
    slot = torch.where(chosen, chosen.cumsum(0) - 1, count)
    return place.new_empty(count + 1).scatter_(0, slot, place)[:count]


@dataclass(frozen=True)
class Packing:
    """Where the executing tokens of a ``(B, T)`` batch go.

    They are flat, ``(1, N)``, for projections and in rows, ``(B, L)``, for attention. Rows keep the tokens' order
    and are left-aligned, so a causal mask alone is right for all of them; L is the largest number of executing
    tokens in a sequence.

    Attributes:
        counts: Executing tokens of each sequence, B of them.
        index: Flat positions of executing tokens in the batch, ``(N,)``; None when every token executes, or no
            token does: L is 0 then, and there is nothing to gather.
        slots: Flat positions of executing tokens in the rows, ``(N,)``; None where rows are a view of the flat tokens.
        ends: Where sequences end among them, the first behind a 0, int32 ``(B + 1,)``; on a GPU, None elsewhere.
    """

    counts: tuple[int, ...]
    index: Tensor | None = None
    slots: Tensor | None = None
    ends: Tensor | None = None

    @classmethod
    def of(cls, executing: Tensor, align: bool = False) -> "Packing":
        """The packing of decisions, bool ``(B, T)``.

        ``align`` repeats the last executing token until N is a round number. On a CPU a matrix product of a shape that
        wasn't seen before costs milliseconds (oneDNN generates code for it), and every layer's N would be another one.
        """
        batch, length = executing.shape
        flat, index, ends = executing.flatten(), None, None
        if executing.is_cpu and batch == 1:
            index = flat.nonzero().squeeze(1)  # which counts them, too
            counts: tuple[int, ...] = (len(index),)
        else:
            # Decoding makes a packing in every layer, and a sum over one token would be most of its time.
            totals = executing.squeeze(1).long() if length == 1 else executing.sum(1)
            # On a GPU the one thing that a layer waits for: its products' shapes.
            counts = tuple(totals.tolist())
        longest, shortest = max(counts), min(counts)
        if shortest == length or longest == 0:
            return cls(counts)
        if not executing.is_cpu:
            index, ends = compact(flat, sum(counts)), nn.functional.pad(totals.cumsum(0), (1, 0)).int()
        elif index is None:
            index = flat.nonzero().squeeze(1)
        more = _up_to_round(len(index)) if align and executing.device.type == "cpu" else 0
        if longest == shortest and not more:
            return cls(counts, index, ends=ends)
        rows = torch.arange(len(counts), device=executing.device).mul_(longest)
        slots = (rows[:, None] + executing.cumsum(1)).flatten()[index] - 1
        if more:
            index, slots = (torch.cat([places, places[-1:].expand(more)]) for places in (index, slots))
        return cls(counts, index, slots, ends)

    @property
    def length(self) -> int:
        """L."""
        return max(self.counts)

    @property
    def uniform(self) -> bool:
        """Whether all sequences have the same number of executing tokens."""
        return max(self.counts) == min(self.counts)

    def gather(self, x: Tensor) -> Tensor:
        """Executing tokens of ``(B, T, …)`` as ``(1, N, …)``; the tensor itself when every token executes."""
        return x if self.index is None else x.flatten(0, 1).index_select(0, self.index).unsqueeze(0)

    def scatter(self, x: Tensor, packed: Tensor) -> Tensor:
        """``x (B, T, …)`` with its executing tokens replaced by ``packed (1, N, …)``."""
        if self.index is None:
            return packed
        return x.flatten(0, 1).index_copy(0, self.index, packed.squeeze(0)).view_as(x)

    def to_rows(self, x: Tensor) -> Tensor:
        """Flat tokens ``(1, N, H, d)`` as rows ``(B, L, H, d)``; unused slots are zero."""
        if self.index is None:
            return x
        shape = (len(self.counts), self.length, *x.shape[2:])
        if self.slots is None:
            return x.view(shape)
        return (
            x.new_zeros(shape[0] * shape[1], *shape[2:]).index_copy_(0, self.slots, x.squeeze(0)).view(shape)
        )

    def from_rows(self, rows: Tensor) -> Tensor:
        """Rows ``(B, L, …)`` as flat tokens ``(1, N, …)``."""
        if self.index is None:
            return rows
        flat = rows.flatten(0, 1)
        return (flat if self.slots is None else flat.index_select(0, self.slots)).unsqueeze(0)


@dataclass(frozen=True)
class Subset:
    """Those of the executing tokens whose output is asked for.

    Attributes:
        packing: Of these tokens, from the same batch; its length is 0 where none is asked for.
        places: Their places among the flat executing tokens, ``(N',)``.
        ranks: How many executing tokens of their sequence are before them, in rows ``(B, L')``; unused slots are 0.
    """

    packing: Packing
    places: Tensor
    ranks: Tensor

    @classmethod
    def of(cls, executing: Tensor, whole: Packing, asked: Tensor, align: bool = False) -> "Subset | None":
        """Of decisions, their packing, and what is asked for, bool ``(B, T)``; None where all of them are."""
        packing = Packing.of(executing & asked, align)
        if packing.counts == whole.counts:
            return None
        if packing.index is None:
            nothing = executing.new_zeros(0, dtype=torch.int64)
            return cls(packing, nothing, nothing)
        if whole.index is None:  # all tokens execute: places among them are those in the batch
            places, ranks = packing.index, packing.index % executing.shape[1]
        else:
            places = executing.flatten().cumsum(0)[packing.index] - 1
            ranks = executing.cumsum(1).flatten()[packing.index] - 1
        return cls(packing, places, packing.to_rows(ranks[None, :, None]).squeeze(-1))

    def select(self, x: Tensor) -> Tensor:
        """Executing tokens, flat ``(1, N, …)`` or all ``(B, T, …)`` → those that are asked for, ``(1, N', …)``."""
        return x.flatten(0, 1).index_select(0, self.places).unsqueeze(0)

    def mask(self, past: Tensor | None, keys: int) -> Tensor:
        """Which of ``keys`` slots each may see, bool ``(B, 1, L', K)``: ``past (B,)`` cached ones, and up to itself."""
        last = self.ranks if past is None else self.ranks + past.to(self.ranks.device)[:, None]
        return (torch.arange(keys, device=last.device) <= last[:, :, None]).unsqueeze(1)


# The place of a slot that holds no key: behind every query.
NOWHERE = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Reach:
    """How far back a layer's queries may see, by the tokens' places in their sequences, executing or not.

    Attributes:
        window: Tokens that one sees, itself among them.
        places: Of a pass's tokens, ``(B, T)``.
        binds: Whether a sequence may be longer than the window.
    """

    window: int
    places: Tensor
    binds: bool

    def mask(self, queries: Packing, keys: Tensor) -> Tensor:
        """Which keys each packed query may see, bool ``(B, 1, L', K)``, of places ``(B, K)``: at and before its own."""
        query = rows_of(self.places, queries)[:, :, None]
        return ((keys[:, None] <= query) & (keys[:, None] > query - self.window)).unsqueeze(1)


def rows_of(places: Tensor, packing: Packing) -> Tensor:
    """Places ``(B, T)`` of packed tokens in rows ``(B, L)``; unused slots are `NOWHERE`."""
    rows = packing.to_rows(packing.gather(places + 1))  # unused slots are zero
    return torch.where(rows == 0, NOWHERE, rows - 1)


def branch_mask(queries: Tensor, keys: Tensor) -> Tensor:
    """Which tokens may see which, bool ``(B, L, K)``, of their branches, ``(B, L, levels)`` and ``(B, K, levels)``."""
    visible = torch.ones((), dtype=torch.bool, device=keys.device)
    for query, key in zip(
        queries.unbind(-1), keys.unbind(-1), strict=True
    ):  # level by level, for less memory
        visible = visible & ((key[:, None, :] == 0) | (key[:, None, :] == query[:, :, None]))
    return visible
