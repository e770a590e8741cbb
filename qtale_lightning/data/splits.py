"""Which rows of a task a run trains on, selects by, and reports on."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from qtale_lightning.data.readers import local_file, read
from qtale_lightning.tasks import TASKS, Question, Split


@dataclass(frozen=True)
class TaskRows:
    """Questions of one task. Calibration questions are never trained on."""

    training: list[Question]
    calibration: list[Question]
    validation: list[Question]


def task_rows(
    task: str,
    root: str | None,
    seed: int,
    calibration_rows: int,
    limit_train: int | None = None,
    limit_validation: int | None = None,
) -> TaskRows:
    """Reads a task's rows and chooses among them by the seed.

    Calibration rows are a task's own (of the hub, or `<root>/<task>/calibration.jsonl`) where it has such a split, or
    else held out of the training rows; a training row that asks a calibration question again is left out.

    Args:
        task: Its name.
        root: Folder of local files; None reads the hub.
        seed: Of the choice and the order.
        calibration_rows: Wanted for calibration.
        limit_train: Training rows taken; None takes all.
        limit_validation: Validation rows taken; None takes all.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as `readers.read`; no row is left to train on.
    """
    rows = _shuffled(task, root, "train", seed)
    own = TASKS[task].calibration and (root is None or local_file(task, root, "calibration").is_file())
    calibration = (_shuffled(task, root, "calibration", seed) if own else rows)[:calibration_rows]
    held_out = {(question.context, question.text) for question in calibration}
    training = [question for question in rows if (question.context, question.text) not in held_out]
    if not training:
        raise ValueError(
            f"task {task!r} has {len(rows)} training rows and {calibration_rows} are held out "
            f"for calibration: none is left to train on; lower --data.calibration_rows"
        )
    validation = _shuffled(task, root, "validation", seed)[:limit_validation]
    return TaskRows(training[:limit_train], calibration, validation)


class Examples:
    """Few-shot examples: the first of the same subject among the task's dev rows, else training rows, in their order.

    lm-evaluation-harness's sampler `first_n`. A question isn't its own example.

    Args:
        task: Its name.
        root: Folder of local files; None reads the hub.
        count: Examples before each question; 0 reads nothing.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as `readers.read`.
    """

    def __init__(self, task: str, root: str | None, count: int) -> None:
        self.task, self.count = task, count
        self._split = TASKS[task].few_shot if count else None
        self._rows: Sequence[Question] = read(task, root, self._split, 0) if self._split else ()

    def of(self, question: Question) -> list[Question]:
        """What stands before a question.

        Raises:
            ValueError: Its subject has too few rows.
        """
        if not self._rows:
            return []
        alike = (row for row in self._rows if row.subject == question.subject and row != question)
        found = [*islice(alike, self.count)]
        if len(found) < self.count:
            raise ValueError(
                f"--data.shots {self.count}: task {self.task!r} has {len(found)} other {self._split} rows of the "
                f"subject {question.subject!r} of the question {question.text[:60]!r}"
            )
        return found


def _shuffled(task: str, root: str | None, split: Split, seed: int) -> list[Question]:
    questions = read(task, root, split, seed)
    Random(f"{task}-{split}-{seed}").shuffle(questions)
    return questions
