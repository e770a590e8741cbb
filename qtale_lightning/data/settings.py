"""What a configuration says of the data (``--data.…``), checked; nothing is read for it."""

from pathlib import Path

from jsonargparse.typing import NonNegativeInt, PositiveInt

from qtale_lightning.data.asking import Asking
from qtale_lightning.tasks import SUITES, resolve_tasks
from qtale_lightning.values import UserPath, ranged

MIXES = ("proportional", "uniform")


class DataSettings:
    """The options of a :class:`~qtale_lightning.data.CommonsenseDataModule`, which inherits them.

    Args:
        tasks: A task, a suite, or a list of them, such as csqa (seven commonsense tasks) or facts (built in).
        root: Folder with <task>/train.jsonl and <task>/validation.jsonl. None reads the Hugging Face hub.
        prompt_style: cloze (score each choice's text) or choice (score each choice's label); some tasks have one only.
        choice_labels: What choices are called in the choice style: letters or numbers.
        shots: Examples before each scored question of a task with choices: its first dev rows
            (<root>/<task>/dev.jsonl) where it has such a split, else its first training rows.
        answers: How validation questions with choices are answered: scored (by log-likelihood) or generated (the model
            writes a choice's label, or its text, which the cloze style doesn't show; what can't be read is wrong).
        max_new_tokens: Tokens of the longest generated answer. None: the task's own limit, 16 where choices are given.
        generations: Validation rows of each task measured by perplexity whose generated answer is kept with the run.
        batch_size: Sequences in a batch of one device.
        max_length: Tokens of the longest sequence, its EOS included; longer ones are cut at their left, and long texts
            that are answers at their end.
        limit_train: Training rows of each task, chosen by the seed. None takes all.
        limit_validation: Validation rows of each task, chosen by the seed. None takes all.
        calibration_rows: Rows of each task held out of the training split; the threshold is selected on them.
        mix: proportional (every row once an epoch) or uniform (equally many rows of each task).
        seed: Seed of the rows chosen and of their order.
        num_workers: Processes that collate batches; 0 does it in the main process.

    Raises:
        ValueError: An argument is out of its range or names something unknown.
        FileNotFoundError: `root` isn't a folder.
    """

    @ranged("data")
    def __init__(
        self,
        tasks: str | list[str] = "csqa",
        root: UserPath | str | None = None,
        prompt_style: str = "cloze",
        choice_labels: str = "letters",
        shots: NonNegativeInt = 0,
        answers: str = "scored",
        max_new_tokens: PositiveInt | None = None,
        generations: NonNegativeInt = 8,
        batch_size: PositiveInt = 16,
        max_length: PositiveInt = 512,
        limit_train: PositiveInt | None = None,
        limit_validation: PositiveInt | None = None,
        calibration_rows: PositiveInt = 64,
        mix: str = "proportional",
        seed: int = 0,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        super().__init__()  # of the LightningDataModule, where this is one
        self.tasks = resolve_tasks(tasks)
        self.asking = Asking(
            self.tasks, prompt_style, choice_labels, shots, answers, max_new_tokens, generations
        )
        if mix not in MIXES:
            raise ValueError(f"unknown mix {mix!r} (--data.mix); known: {', '.join(MIXES)}")
        if root is not None and not Path(root).is_dir():
            raise FileNotFoundError(
                f"--data.root {root}: not a folder; it must hold <task>/train.jsonl files"
            )
        self.root = root
        self.batch_size = batch_size
        self.max_length = max_length
        self.limit_train = limit_train
        self.limit_validation = limit_validation
        self.calibration_rows = calibration_rows
        self.mix = mix
        self.seed = seed
        self.num_workers = num_workers

    @property
    def label(self) -> str:
        """Short name of the data in run names and tables: a suite's name, or the tasks joined with "+"."""
        suites = {tasks: name for name, tasks in SUITES.items()}
        return suites.get(self.tasks, "+".join(self.tasks))
