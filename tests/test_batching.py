from hypothesis import given
from hypothesis import strategies as st

from qtale_lightning.batching import by_length


@given(lengths=st.lists(st.integers(1, 40)), tokens=st.integers(1, 200))
def test_every_sequence_is_in_one_batch_that_fits(lengths: list[int], tokens: int) -> None:
    batches = [*by_length(lengths, tokens)]
    assert sorted(i for batch in batches for i in batch) == [*range(len(lengths))]
    sizes = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    assert all(size <= tokens or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
    order = [lengths[i] for batch in batches for i in batch]
    assert order == sorted(order, reverse=True)


def test_no_batch_is_smaller_than_it_has_to_be() -> None:
    assert [*by_length([3, 5, 5, 1], 10)] == [[1, 2], [0, 3]]
