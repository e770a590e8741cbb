"""Batches of sequences of similar length, in an order that a seed fixes and a resumed run goes on with."""

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from torch.utils.data import DataLoader, Sampler

BATCHES_PER_WINDOW = 50


class LengthBatchSampler(Sampler[list[int]]):
    """Shuffles by (seed, epoch), sorts by length within windows, and cuts into batches of equal size.

    An epoch's order depends on the seed, the epoch and the *global* batch (`batch_size` × `num_replicas`)
    alone; rank r takes every `num_replicas`-th row of a global batch. Rows that don't fill a last batch are
    left out, others each epoch.

    Args:
        lengths: Tokens of each sequence.
        batch_size: Sequences in a rank's batch.
        seed: Seed of the order.
        num_replicas: Number of ranks.
        rank: This rank, from 0.

    Raises:
        ValueError: There are fewer sequences than a global batch.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int = 0, num_replicas: int = 1, rank: int = 0
    ) -> None:
        self.lengths = lengths
        self.seed = seed
        self.num_replicas = num_replicas
        self.rank = rank
        self.epoch = 0
        self.start = 0
        self.global_batch = batch_size * num_replicas
        if len(lengths) < self.global_batch:
            raise ValueError(
                f"{len(lengths)} training rows are fewer than one batch of {batch_size} rows on each of "
                f"{num_replicas} device(s); lower --data.batch_size or use more rows (--data.limit_train)"
            )

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Chooses what the next iteration yields: batches `start` to the last of an epoch."""
        self.epoch, self.start = epoch, start

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch for this rank, as lists of row indices."""
        random = Random(f"{self.seed}-{epoch}")
        rows = list(range(len(self.lengths)))
        random.shuffle(rows)
        rows = rows[: len(self) * self.global_batch]
        window = BATCHES_PER_WINDOW * self.global_batch
        ordered = [
            row
            for begin in range(0, len(rows), window)
            for row in sorted(rows[begin : begin + window], key=self.lengths.__getitem__)
        ]
        batches = [
            ordered[begin : begin + self.global_batch] for begin in range(0, len(ordered), self.global_batch)
        ]
        random.shuffle(batches)
        return [batch[self.rank :: self.num_replicas] for batch in batches]

    def __len__(self) -> int:
        """Batches of a whole epoch, also where the next iteration starts later."""
        return len(self.lengths) // self.global_batch

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches(self.epoch)[self.start :])


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` over a `LengthBatchSampler` that starts each iteration where training stands.

    Lightning restores its counters in the middle of an epoch, but begins the loader's iteration from the
    epoch's first batch, and passes the epoch on to samplers only, not to batch samplers.

    Args:
        dataset: List of rows.
        batch_sampler: Order of the rows.
        position: Says where the next iteration starts: (epoch, batch within the epoch).
        **options: Further options of `DataLoader`.
    """

    def __init__(
        self,
        dataset: Sequence[Any],
        batch_sampler: LengthBatchSampler,
        position: Callable[[], tuple[int, int]],
        **options: Any,
    ) -> None:
        super().__init__(dataset, batch_sampler=batch_sampler, **options)  # type: ignore[arg-type]
        self.order = batch_sampler
        self.position = position

    def __iter__(self) -> Any:
        self.order.set_epoch(*self.position())
        return super().__iter__()
