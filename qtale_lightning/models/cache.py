"""The cache of a routed model: a token that skips a layer leaves no key and no value there, unless they are kept."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from qtale_lightning import cpu
from qtale_lightning.models.packing import NOWHERE, Packing, rows_of

_GROWTH = 64  # slots added at a time while decoding, so that not every token copies the cache


class RoutedCacheLayer(CacheLayerMixin):
    """Keys and values of one layer's executing tokens, left-aligned by sequence.

    Attributes:
        keys, values: Buffers ``(B, H, capacity, d)``; slots at and behind a sequence's length are unused.
        lengths: Tokens kept of each sequence, B of them.
        places: Of kept tokens in their sequences ``(B, capacity)``, in a layer with a window; as far as they were asked
            for, which they are once a sequence is longer than it.
        noted: What the others follow from: the places of a pass's tokens, its packing, and the lengths before.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.lengths: tuple[int, ...] = ()
        self.places: Tensor | None = None
        self.noted: list[tuple[Tensor, Packing, tuple[int, ...]]] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty buffers for keys like ``key_states (B, H, *, d)``."""
        batch, heads, _, width = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, 0, width)
        self.values = value_states.new_zeros(batch, heads, 0, width)
        self.lengths = (0,) * batch
        self.is_initialized = True

    @property
    def longest(self) -> int:
        """Slots in use by the longest sequence."""
        return max(self.lengths, default=0)

    def _reserve(self, capacity: int, spare: int) -> None:
        assert self.keys is not None
        assert self.values is not None
        missing = capacity - self.keys.shape[2]
        if missing > 0:
            missing += spare
            self.keys = nn.functional.pad(self.keys, (0, 0, 0, missing))
            self.values = nn.functional.pad(self.values, (0, 0, 0, missing))

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, packing: Packing
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append rows ``(B, H, L, d)`` of a packing; return all keys, all values and the mask between them.

        The mask, bool ``(B, 1, L, K)``, is None where causal attention alone is right (nothing was cached, or one
        new token in sequences of equal length).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        past, new = self.lengths, packing.length
        shortest, longest = min(past), max(past)
        if (
            longest == 0 and new > 1
        ):  # a prompt: nothing to append to, and nothing to copy until a token follows
            self.keys, self.values, self.lengths = key_states, value_states, packing.counts
            return key_states, value_states, None
        # Room for padding slots too: they are written behind a sequence's end, and overwritten later.
        self._reserve(longest + new, _GROWTH if new == 1 else 0)
        aligned = shortest == longest
        if aligned:
            self.keys[:, :, longest : longest + new] = key_states
            self.values[:, :, longest : longest + new] = value_states
        else:
            starts = torch.tensor(past, device=key_states.device)
            slots = starts[:, None] + torch.arange(new, device=key_states.device)
            rows = torch.arange(len(past), device=key_states.device)[:, None]
            self.keys[rows, :, slots] = key_states.transpose(1, 2)
            self.values[rows, :, slots] = value_states.transpose(1, 2)
        self.lengths = tuple(kept + count for kept, count in zip(past, packing.counts, strict=True))
        end = self.longest
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        if longest == 0 or (new == 1 and aligned and packing.uniform):
            return keys, values, None
        queries = torch.tensor(past, device=keys.device)[:, None] + torch.arange(new, device=keys.device)
        mask = torch.arange(end, device=keys.device) <= queries[:, :, None]
        return keys, values, mask[:, None]

    def remember(self, places: Tensor, packing: Packing) -> None:
        """Note the places ``(B, T)`` of a pass whose packing is about to be appended; :meth:`recall` works them out."""
        self.noted.append((places, packing, self.lengths or (0,) * len(packing.counts)))

    def recall(self) -> Tensor:
        """Places of all keys ``(B, K)``; unused slots of what is returned are behind every query."""
        for places, packing, past in self.noted:
            self._place(rows_of(places, packing), past)
        self.noted = []
        assert self.places is not None
        lengths = torch.tensor(self.lengths, device=self.places.device)
        used = torch.arange(self.longest, device=self.places.device) < lengths[:, None]
        return torch.where(used, self.places[:, : self.longest], NOWHERE)

    def _place(self, rows: Tensor, past: Sequence[int]) -> None:
        """Write places ``(B, L)`` behind so many of each sequence; unused ones are overwritten later."""
        batch, new = rows.shape
        if self.places is None:
            self.places = rows.new_full((batch, 0), NOWHERE)
        if (missing := max(past) + new - self.places.shape[1]) > 0:
            self.places = nn.functional.pad(self.places, (0, missing + _GROWTH), value=NOWHERE)
        starts = torch.tensor(past, device=rows.device)
        self.places.scatter_(1, starts[:, None] + torch.arange(new, device=rows.device), rows)

    def reserve_next(self) -> None:
        """Room for one more token of every sequence."""
        assert self.keys is not None
        if max(self.lengths) >= self.keys.shape[2]:
            self._reserve(self.longest + 1, _GROWTH)

    def attend_next(
        self, query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float
    ) -> Tensor:
        """Append the one token that each executing sequence of a packing has; attend from it to all of its sequence.

        Query ``(1, N, H, d)``, key and value ``(1, N, H_kv, d)`` are flat, or ``(B, 1, …)`` where every sequence
        executes; the output is shaped as the query.
        """
        if not self.is_initialized:
            batch, heads, width = len(packing.counts), *key.shape[2:]
            self.lazy_initialization(*(x.new_empty(batch, heads, 0, width) for x in (key, value)))
        self.reserve_next()
        assert self.keys is not None
        assert self.values is not None
        rows = [row for row, count in enumerate(packing.counts) if count]
        lengths = [self.lengths[row] for row in rows]
        new = query.contiguous(), key.contiguous(), value.contiguous()
        output = cpu.attend_next(*new, self.keys, self.values, rows, lengths, scaling)
        self.lengths = tuple(kept + count for kept, count in zip(self.lengths, packing.counts, strict=True))
        return output

    def past(self, packing: Packing) -> Tensor | None:
        """Tokens of each sequence that were here before those of a packing, which came last, ``(B,)``; None: no one."""
        before = [kept - new for kept, new in zip(self.lengths, packing.counts, strict=True)]
        return torch.tensor(before) if any(before) else None

    def get_seq_length(self) -> int:
        """Slots in use; fewer than the tokens seen where tokens skipped the layer."""
        return self.longest

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Unused: a routed model makes its own masks."""
        return self.longest + query_length, 0

    def select(self, index: Tensor) -> None:
        """Keep the sequences ``index (B',)``, in that order, repeated where it repeats."""
        if self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            index = index.to(self.keys.device)
            if self.noted:
                self.recall()  # of the sequences as they are
            self.keys, self.values = (part[index].contiguous() for part in (self.keys, self.values))
            if self.places is not None:
                self.places = self.places[index]
            self.lengths = tuple(self.lengths[i] for i in index.tolist())

    def memory(self) -> int:
        """Bytes of kept keys and values (buffers' spare slots not counted)."""
        if self.keys is None:
            return 0
        _, heads, _, width = self.keys.shape
        return 2 * sum(self.lengths) * heads * width * self.keys.element_size()

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]


class RoutedCache(Cache):
    """Per-layer keys and values of executing tokens only; made for a call, so nothing leaks into the next one.

    Attributes:
        seen: Tokens (padding included) that went through the model, whichever layers they executed.
        of_one_call: Whether `generate()` made it, so that nobody reads it after.
    """

    layers: list[RoutedCacheLayer]  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=RoutedCacheLayer)
        self.seen = 0
        self.of_one_call = False

    def layer(self, index: int) -> RoutedCacheLayer:
        """The cache of a layer, made on first use."""
        while len(self.layers) <= index:
            self.layers.append(RoutedCacheLayer())
        return self.layers[index]

    def buffers(self) -> list[Tensor]:
        """Keys and values of each layer, which has kept a token before, one after the other."""
        return [part for layer in self.layers for part in (layer.keys, layer.values)]  # type: ignore[misc]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, the same for every layer: what positions are counted from."""
        return self.seen

    def select(self, index: Tensor) -> None:
        """Keep the sequences ``index (B',)`` in every layer, in that order; a sequence can be kept several times."""
        for layer in self.layers:
            layer.select(index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow beam search's choice of beams."""
        self.select(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: which layers a token to remove has executed isn't kept.

        Raises:
            NotImplementedError: always; assisted generation ends here.
        """
        raise NotImplementedError(
            "a RoutedCache cannot forget its last tokens: generate without assistant_model and "
            "prompt_lookup_num_tokens"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence, for several continuations of each."""
        for layer in self.layers:
            layer.select(torch.arange(len(layer.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``."""
        self.select(indices)

    def reset(self) -> None:
        """Forget everything."""
        self.layers, self.seen = [], 0

    def memory(self) -> int:
        """Bytes of kept keys and values of all layers."""
        return sum(layer.memory() for layer in self.layers)
