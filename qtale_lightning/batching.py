"""Batches of sequences of similar length: what little padding costs, and memory that runs out at once or never."""

from collections.abc import Iterator, Sequence


def by_length(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of sequences, longest first: at most `tokens` a batch with padding, or one sequence.

    Args:
        lengths: Of each sequence, with what is still to be added to it.
        tokens: Of a batch, all of whose sequences are padded to its longest.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
