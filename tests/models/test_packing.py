"""Gathering and scattering move values: every comparison is exact."""

import pytest
import torch
from torch import Tensor

from qtale_lightning import cpu
from qtale_lightning.models.packing import Packing, Subset

BATCH, LENGTH, HEADS, WIDTH = 4, 7, 3, 5


def executing(kind: str) -> Tensor:
    """Decisions ``(B, T)`` of one kind, from a fixed seed."""
    generator = torch.Generator().manual_seed(2)
    order = torch.rand(BATCH, LENGTH, generator=generator).argsort(1)
    counts = {
        "uniform": [3, 3, 3, 3],
        "ragged": [5, 2, 7, 1],
        "some rows without": [0, 4, 0, 2],
        "one row alone": [0, 0, 3, 0],
        "all": [LENGTH] * BATCH,
        "none": [0] * BATCH,
    }[kind]
    return order < torch.tensor(counts)[:, None]


KINDS = ["uniform", "ragged", "some rows without", "one row alone", "all"]


def values() -> Tensor:
    return torch.arange(1.0, 1 + BATCH * LENGTH * HEADS * WIDTH).view(BATCH, LENGTH, HEADS, WIDTH)


@pytest.mark.parametrize("kind", KINDS)
def test_gather_takes_executing_tokens_in_order(kind: str) -> None:
    gate = executing(kind)
    packing = Packing.of(gate)
    assert packing.counts == tuple(gate.sum(1).tolist())
    assert packing.length == max(packing.counts)
    assert packing.uniform == (len(set(packing.counts)) == 1)
    assert torch.equal(packing.gather(values()).flatten(0, 1), values()[gate])


@pytest.mark.parametrize("kind", KINDS)
def test_scatter_replaces_executing_tokens_alone(kind: str) -> None:
    gate, x = executing(kind), values()
    packing = Packing.of(gate)
    expected = torch.where(gate[..., None, None], -x, x)
    assert torch.equal(packing.scatter(x, -packing.gather(x)), expected)
    assert torch.equal(x, values())  # the residual stream itself is not written to


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_left_aligned_and_come_back(kind: str) -> None:
    gate, x = executing(kind), values()
    packing = Packing.of(gate)
    flat = packing.gather(x)
    rows = packing.to_rows(flat)
    assert rows.shape == (BATCH, packing.length, HEADS, WIDTH)
    for row, count in enumerate(packing.counts):
        assert torch.equal(rows[row, :count], x[row, gate[row]])
        assert not rows[row, count:].any()
    assert torch.equal(packing.from_rows(rows), flat)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 0.95])
def test_random_gates_make_the_round_trip(share: float) -> None:
    generator = torch.Generator().manual_seed(4)
    for _ in range(20):
        batch, length = (int(torch.randint(1, 6, (), generator=generator)) for _ in range(2))
        gate = torch.rand(batch, length, generator=generator) < share
        packing = Packing.of(gate)
        assert packing.counts == tuple(gate.sum(1).tolist())
        if packing.length == 0:
            continue
        x = torch.randn(batch, length, HEADS, WIDTH, generator=generator)
        flat = packing.gather(x)
        assert torch.equal(flat.flatten(0, 1), x[gate])
        back = packing.scatter(torch.zeros_like(x), packing.from_rows(packing.to_rows(flat)))
        assert torch.equal(back, torch.where(gate[..., None, None], x, 0.0))


def test_nobody_executing_has_length_zero() -> None:
    packing = Packing.of(executing("none"))
    assert packing.length == 0
    assert packing.counts == (0,) * BATCH


def test_all_executing_copies_nothing() -> None:
    packing, x = Packing.of(executing("all")), values()
    assert packing.gather(x) is x
    assert packing.to_rows(x) is x
    assert packing.from_rows(x) is x


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("present", [0.6, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_asked_tokens_are_selected_among_executing_ones(batch: int, present: float, share: float) -> None:
    """Row by row: an asked token's rank is the number of executing ones before it, and it sees those and itself."""
    generator = torch.Generator().manual_seed(5)
    gate, asked = (torch.rand(batch, LENGTH, generator=generator) < of for of in (present, share))
    whole, x = Packing.of(gate), torch.arange(1.0, 1 + batch * LENGTH).view(batch, LENGTH, 1)
    found = Subset.of(gate, whole, asked)
    if bool((gate & ~asked).logical_not().all()):
        assert found is None
        return
    assert found is not None
    both = gate & asked
    assert found.packing.counts == tuple(both.sum(1).tolist())
    if not both.any():
        assert found.packing.length == 0
        return
    assert torch.equal(found.select(whole.gather(x)).flatten(), x[both].flatten())
    mask = found.mask(None, whole.length)
    for row in range(batch):
        ranks = [int(gate[row, :place].sum()) for place in both[row].nonzero().flatten().tolist()]
        for query, rank in enumerate(ranks):
            assert mask[row, 0, query].tolist() == [key <= rank for key in range(whole.length)]


@pytest.mark.parametrize("length", [40, 150])
def test_tokens_are_repeated_only_where_products_are_not_ours(length: int) -> None:
    """Of 2 × `length` tokens all but one execute; up to 128 are multiplied by our operation, where it was built."""
    gate = torch.ones(2, length, dtype=torch.bool)
    gate[0, 3] = False
    packing = Packing.of(gate, align=True)
    assert packing.index is not None
    executed = 2 * length - 1
    expected = (
        executed if executed <= cpu.few_tokens() else executed + -executed % (16 if executed <= 128 else 32)
    )
    assert len(packing.index) == expected
