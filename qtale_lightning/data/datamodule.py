"""`CommonsenseDataModule`: from task names to training batches and scored questions."""

import logging
import warnings
from collections.abc import Sequence
from itertools import chain, zip_longest
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler
from transformers import PreTrainedTokenizerBase

from qtale_lightning import digests
from qtale_lightning.data.sampler import LengthBatchSampler, ResumableLoader
from qtale_lightning.data.settings import DataSettings
from qtale_lightning.data.splits import Examples, task_rows
from qtale_lightning.data.tokenization import (
    EncodedPrompt,
    TrainingExample,
    collate,
    training_example,
)
from qtale_lightning.tasks import TASKS, Question

log = logging.getLogger(__name__)


class CommonsenseDataModule(DataSettings, LightningDataModule):
    """Questions: trained on as the right answer's text, scored choice by choice, and answered in writing.

    Set `tokenizer` to the model's tokenizer before `setup`.

    The options are those of :class:`~qtale_lightning.data.settings.DataSettings`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._train: dict[str, list[TrainingExample]] = {}
        self._scored: dict[str, list[EncodedPrompt]] = {}
        self._digests: dict[str, dict[str, str]] = {}
        self._resumed_order: dict[str, Any] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one device in a whole epoch."""
        return self.batches(self._replicas()[0])

    def batches(self, devices: int) -> int:
        """Batches of each of so many devices in a whole epoch (ValueError: the rows are fewer than one each)."""
        return len(LengthBatchSampler([0] * len(self._mixed()), self.batch_size, self.seed, devices))

    def setup(self, stage: str | None = None) -> None:
        """Reads, chooses and encodes the rows; the second call does nothing.

        Raises:
            RuntimeError: `tokenizer` isn't set.
            ValueError: The tokenizer has no EOS or adds one, rows are malformed, or a task has too few rows.
        """
        if self._train:
            return
        tokenizer = self.checked_tokenizer()
        scored: dict[str, list[EncodedPrompt]] = {"validation": [], "calibration": []}
        train = {}
        for task in self.tasks:
            rows = task_rows(
                task, self.root, self.seed, self.calibration_rows, self.limit_train, self.limit_validation
            )
            examples = Examples(task, self.root, self.asking.shots)
            asked = {"calibration": rows.calibration, "validation": rows.validation}
            encoded = {
                split: [self._encode(question, examples.of(question)) for question in questions]
                for split, questions in asked.items()
            }
            golds = [self._encode(question, gold_only=True) for question in rows.training]
            train[task] = [training_example(gold, tokenizer.eos_token_id) for gold in golds]
            for split, questions in encoded.items():
                scored[split] += questions
            self._warn_of_cut_answers(task, [*golds, *chain.from_iterable(encoded.values())])
        self._train, self._scored = train, scored

    def train_dataloader(self) -> ResumableLoader:
        """Batches of `collate`; equally many on every rank, and from where the run stands if it was resumed.

        The Trainer must leave the ranks' shares to it (`use_distributed_sampler=False`).

        Raises:
            ValueError: The rows are fewer than a batch, or the run is resumed from one with another order of
                rows.
        """
        order, resumed = self._order(), self._resumed_order or {}
        if differing := [key for key, value in resumed.items() if value != order.get(key)]:
            # What a checkpoint doesn't say, of those before rows were known by content, can't be compared.
            there, here = ({key: one.get(key) for key in differing} for one in (resumed, order))
            raise ValueError(
                f"the checkpoint's place in the training data refers to {there}, but this run has {here}: resume with "
                "the same rows, --data options and number of devices, or start a new run"
            )
        # Lightning doesn't see that a resumed iteration starts at `_position`.
        warnings.filterwarnings("ignore", message=".*dataloader is not resumable.*")
        examples = self._mixed()
        return ResumableLoader(
            examples,
            batch_sampler=self._batch_sampler(examples),
            position=self._position,
            collate_fn=self._collate,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> "DataLoader[TrainingExample]":
        """Batches of `collate` on the right answers of the calibration questions, sorted by length.

        They choose the best checkpoint, so they are held out of training rows: the validation questions, which
        results are reported on, decide nothing.

        With several ranks, a few rows are seen twice where their number doesn't divide.
        """
        eos_id = self.checked_tokenizer().eos_token_id
        examples = [training_example(encoded, eos_id) for encoded in self.questions("calibration")]
        examples.sort(key=lambda example: len(example.input_ids))
        replicas, rank = self._replicas()
        return DataLoader(
            examples,  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=self.batch_size,
            sampler=DistributedSampler(examples, replicas, rank, shuffle=False) if replicas > 1 else None,  # type: ignore[arg-type]
            collate_fn=self._collate,
            num_workers=self.num_workers,
        )

    def state_dict(self) -> dict[str, Any]:
        """What the order of training rows depends on; Lightning itself saves the number of batches done."""
        return {"order": self._order()} if self._train else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers the checkpoint's order; `train_dataloader` checks that this run has the same."""
        self._resumed_order = state_dict.get("order")

    def questions(self, split: Literal["validation", "calibration"]) -> list[EncodedPrompt]:
        """Encoded questions of a split, task after task. Calibration questions are never trained on.

        Raises:
            ValueError: The split is unknown.
            RuntimeError: `setup` hasn't run.
        """
        self._require_setup()
        if split not in self._scored:
            raise ValueError(f"unknown split {split!r}; known: {', '.join(self._scored)}")
        return self._scored[split]

    def digests(self) -> dict[str, dict[str, str]]:
        """What the rows are known by: digests of them as they are encoded, by split (train too) and task.

        Raises:
            RuntimeError: `setup` hasn't run.
        """
        self._require_setup()
        if not self._digests:
            self._digests = {"train": {task: digests.of_rows(rows) for task, rows in self._train.items()}}
            for split, rows in self._scored.items():
                by_task = {task: [row for row in rows if row.task == task] for task in self.tasks}
                self._digests[split] = {task: digests.of_rows(asked) for task, asked in by_task.items()}
        return self._digests

    def digest(self, split: Literal["train", "validation", "calibration"]) -> str:
        """The digest of all rows of a split, as it stands in a row's fingerprint."""
        return digests.of_split(self.digests()[split])

    def calibration_sequences(self, count: int) -> list[list[int]]:
        """Token ids of training sequences (prompt and right answer) for quantization, each task in turn.

        Args:
            count: Sequences wanted; all are returned where the training rows are fewer.
        """
        self._require_setup()
        in_turn = chain.from_iterable(zip_longest(*self._train.values()))
        return [list(example.input_ids) for example in in_turn if example is not None][:count]

    def protocol(self) -> dict[str, Any]:
        """What a score depends on besides the model; recorded with every result."""
        tokenizer = self.checked_tokenizer()
        protocol: dict[str, Any] = {
            **self.asking.record(),
            "bos": tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id,
            "loss_mask": "answer",
            "max_length": self.max_length,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "root": self.root or ("hub" if any(TASKS[task].hub for task in self.tasks) else "built-in"),
            "limit_train": self.limit_train,
            "limit_validation": self.limit_validation,
            "calibration_rows": self.calibration_rows,
            "mix": self.mix,
        }
        if self.root is None:  # these commits are what is read, or nothing is
            hubs = {task: TASKS[task].hub for task in self.tasks}
            protocol["revisions"] = {task: hub.revision for task, hub in hubs.items() if hub is not None}
        return protocol

    def checked_tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            RuntimeError: `tokenizer` isn't set.
            ValueError: It has no EOS or adds one.
        """
        if self.tokenizer is None:
            raise RuntimeError(
                "CommonsenseDataModule.tokenizer isn't set: give it the model's tokenizer first"
            )
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token, which every training sequence ends with")
        if self.tokenizer("a")["input_ids"][-1] == self.tokenizer.eos_token_id:
            raise ValueError("the tokenizer appends EOS to every text; load it with add_eos_token=False")
        return self.tokenizer

    def _require_setup(self) -> None:
        if not self._train:
            raise RuntimeError("CommonsenseDataModule.setup() hasn't run")

    def _encode(
        self, question: Question, examples: Sequence[Question] = (), gold_only: bool = False
    ) -> EncodedPrompt:
        # One token of max_length is kept for the EOS that follows the answer in training.
        return self.asking.encode(
            self.checked_tokenizer(), question, self.max_length - 1, examples, gold_only
        )

    def _warn_of_cut_answers(self, task: str, encoded: Sequence[EncodedPrompt]) -> None:
        if cut := sum(question.answer_cut for question in encoded):
            where = f"--data.max_length {self.max_length}"
            log.warning("%d of %d answers of %s lost their end to %s", cut, len(encoded), task, where)

    def _mixed(self) -> list[TrainingExample]:
        """The rows of an epoch. Uniform: each task's rows are repeated or cut to the tasks' mean size."""
        self._require_setup()
        tasks = list(self._train.values())
        if self.mix == "proportional":
            return [example for examples in tasks for example in examples]
        size = sum(map(len, tasks)) // len(tasks)
        return [examples[row % len(examples)] for examples in tasks for row in range(size)]

    def _replicas(self) -> tuple[int, int]:
        """(number of ranks, this rank)."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _batch_sampler(self, examples: list[TrainingExample]) -> LengthBatchSampler:
        lengths = [len(example.input_ids) for example in examples]
        return LengthBatchSampler(lengths, self.batch_size, self.seed, *self._replicas())

    def _collate(self, examples: list[TrainingExample]) -> dict[str, Any]:
        tokenizer = self.checked_tokenizer()
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return collate(examples, pad_id)

    def _order(self) -> dict[str, Any]:
        return {
            "tasks": self.label,
            "mix": self.mix,
            "rows": len(self._mixed()),
            "content": self.digest("train")[:16],
            "global_batch": self.batch_size * self._replicas()[0],
            "seed": self.seed,
        }

    def _position(self) -> tuple[int, int]:
        """(epoch, batches of it that are done).

        Taken from the number of batches processed since the run's first, which a checkpoint restores rightly
        wherever it was saved: within an epoch, at its end, or in `on_train_batch_end`, before the batch is
        completed.
        """
        if self.trainer is None:
            return 0, 0
        steps, limit = self.steps_per_epoch, self.trainer.limit_train_batches
        steps = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
        return divmod(self.trainer.fit_loop.epoch_loop.batch_progress.total.processed, steps)  # type: ignore[attr-defined]
