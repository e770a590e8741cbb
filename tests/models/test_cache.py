"""The cache of one layer against lists of what each sequence kept; keys are copied, so equality is exact."""

import pytest
import torch
from torch import Tensor

from qtale_lightning import cpu
from qtale_lightning.models.cache import RoutedCache, RoutedCacheLayer
from qtale_lightning.models.packing import Packing

HEADS, WIDTH = 2, 4

Kept = list[Tensor]  # keys of each sequence, (H, n, d)


def gates(kind: str, batch: int, length: int, generator: torch.Generator) -> Tensor:
    if kind == "all":
        return torch.ones(batch, length, dtype=torch.bool)
    if kind == "one row":
        return torch.arange(batch)[:, None].expand(batch, length) == batch - 1
    return torch.rand(batch, length, generator=generator) < 0.5


def append(layer: RoutedCacheLayer, kept: Kept, gate: Tensor, generator: torch.Generator) -> Kept:
    """One call's update, compared in full; values are the negated keys."""
    packing = Packing.of(gate)
    if packing.length == 0:  # a layer that nobody executes isn't called
        return kept
    batch, length = gate.shape
    fresh = torch.randn(batch, length, HEADS, WIDTH, generator=generator)
    rows = packing.to_rows(packing.gather(fresh)).transpose(1, 2)
    keys, values, mask = layer.update(rows, -rows, packing)
    past = [sequence.shape[1] for sequence in kept]
    kept = [torch.cat([old, fresh[i, gate[i]].transpose(0, 1)], 1) for i, old in enumerate(kept)]
    assert layer.lengths == tuple(sequence.shape[1] for sequence in kept)
    if mask is None:  # causal attention alone
        visible = torch.ones(packing.length, keys.shape[2], dtype=torch.bool)
        mask = visible.tril() if packing.length > 1 else visible
        mask = mask.expand(batch, 1, *mask.shape)
    for i, sequence in enumerate(kept):
        n = sequence.shape[1]
        assert torch.equal(keys[i, :, :n], sequence)
        assert torch.equal(values[i, :, :n], -sequence)
        for query in range(packing.counts[i]):  # a query sees what is before it, and itself
            seen = torch.arange(keys.shape[2]) <= past[i] + query
            assert torch.equal(mask[i, 0, query], seen)
    return kept


def empty(batch: int) -> Kept:
    return [torch.zeros(HEADS, 0, WIDTH) for _ in range(batch)]


@pytest.mark.parametrize("kind", ["all", "one row", "random"])
@pytest.mark.parametrize("lengths", [[5, 1, 1, 1], [1, 1, 1, 4], [3, 2, 1, 4, 1], [1] * 70, [2, 66, 1, 1]])
def test_updates_append_and_mask(kind: str, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    layer, kept = RoutedCacheLayer(), empty(3)
    for length in lengths:
        kept = append(layer, kept, gates(kind, 3, length, generator), generator)


@pytest.mark.parametrize("seed", range(6))
def test_sequences_are_selected_reordered_and_repeated(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cache = RoutedCache()
    layer, kept = cache.layer(0), empty(3)
    for step in range(12):
        batch = len(kept)
        gate = gates("all" if step % 4 == 3 else "random", batch, 1 if step % 3 else 3, generator)
        kept = append(layer, kept, gate, generator)
        if not layer.is_initialized:
            continue
        index = torch.randint(batch, (batch,), generator=generator)
        if step % 3 == 0:
            cache.reorder_cache(index)
        elif step % 3 == 1:
            index = index[: max(2, batch - 1)]
            cache.batch_select_indices(index)
        else:
            index = torch.arange(batch).repeat_interleave(2)
            cache.batch_repeat_interleave(2)
        kept = [kept[i] for i in index.tolist()]
        assert layer.lengths == tuple(sequence.shape[1] for sequence in kept)
        assert cache.memory() == 2 * sum(layer.lengths) * HEADS * WIDTH * 4


def test_a_repeated_sequence_does_not_share_its_buffer() -> None:
    generator = torch.Generator().manual_seed(0)
    cache = RoutedCache()
    layer = cache.layer(0)
    kept = append(layer, empty(1), torch.ones(1, 4, dtype=torch.bool), generator)
    cache.batch_repeat_interleave(2)
    append(layer, kept * 2, torch.tensor([[True], [False]]), generator)
    assert layer.lengths == (5, 4)


@torch.no_grad()
def test_the_shorter_sequences_go_on_where_the_longest_is_dropped() -> None:
    """A prompt's keys are views of rows; what is kept of them is decoded with."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, 4, 2, 32, generator=generator).transpose(1, 2) for _ in range(2)]
    layer = RoutedCache().layer(0)
    layer.update(*rows, Packing.of(torch.tensor([[True] * 4, [True, True, False, False]])))
    layer.select(torch.tensor([1]))
    assert layer.lengths == (2,)
    new = [torch.randn(1, 1, heads, 32, generator=generator) for heads in (4, 2, 2)]
    if not cpu.ready(*new):
        pytest.skip("our CPU operations weren't built here")
    found = layer.attend_next(*new, Packing.of(torch.ones(1, 1, dtype=torch.bool)), 0.1)
    keys, values = (
        torch.cat([part[1:, :, :2], one.transpose(1, 2)], 2) for part, one in zip(rows, new[1:], strict=True)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        new[0].transpose(1, 2), keys, values, scale=0.1, enable_gqa=True
    )
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_a_layer_that_nobody_has_executed_follows_reordering() -> None:
    cache = RoutedCache()
    append(cache.layer(1), empty(2), torch.tensor([[True], [False]]), torch.Generator())
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.batch_repeat_interleave(3)
    assert cache.layer(0).lengths == ()
    assert cache.layer(1).lengths == (0,) * 6
    append(cache.layer(0), empty(6), torch.ones(6, 1, dtype=torch.bool), torch.Generator())


def test_reset_forgets() -> None:
    cache = RoutedCache()
    assert cache.memory() == 0
    append(cache.layer(0), empty(2), torch.ones(2, 3, dtype=torch.bool), torch.Generator())
    cache.seen = 3
    layer = cache.layer(0)
    layer.reset()
    assert layer.memory() == 0
    append(layer, empty(1), torch.ones(1, 2, dtype=torch.bool), torch.Generator())  # of another batch size
    cache.reset()
    assert cache.memory() == cache.get_seq_length() == 0


def test_forgetting_the_last_tokens_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="without assistant_model"):
        RoutedCache().crop(-1)
