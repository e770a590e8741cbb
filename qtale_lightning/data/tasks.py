"""The tasks: one declaration each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from qtale_lightning.data.parsing import (
    Question,
    Row,
    parse_alpaca,
    parse_boolq,
    parse_lettered,
    parse_mmlu,
    parse_piqa,
    parse_samsum,
    parse_social_iqa,
    parse_winogrande,
)

Split = Literal["train", "validation", "calibration", "dev"]
Metric = Literal["acc", "acc_norm", "perplexity", "rougeL"]


@dataclass(frozen=True)
class HubSource:
    """A dataset on the Hugging Face hub that loads without a script, and which of its splits serve for what.

    A split may be a slice, as `datasets` writes it: "train[:-2000]".

    Attributes:
        path: Name of the dataset.
        revision: The commit that is read, and recorded in the protocol of every result.
        config: Name of its configuration, which is the folder of its files; None where it has one only.
        required: Columns that it must have although a local file may go without.
        train, validation: What is trained on, and what results are reported on.
        calibration: What θ is selected on, where that isn't held out of the training rows.
        dev: Examples for few-shot prompts.
        skip_empty: Field whose rows are left out where it is empty, since the published dataset has such rows.
    """

    path: str
    revision: str
    config: str | None = None
    required: tuple[str, ...] = ()
    train: str = "train"
    validation: str = "validation"
    calibration: str | None = None
    dev: str | None = None
    skip_empty: str | None = None

    def split(self, split: Split) -> str | None:
        """The dataset's name of one of our splits; None where it has none."""
        names = {
            "train": self.train,
            "validation": self.validation,
            "calibration": self.calibration,
            "dev": self.dev,
        }
        return names[split]


@dataclass(frozen=True)
class Task:
    """Declaration of one task.

    Attributes:
        name: Name in configurations and folder name of its local files.
        metric: What the task reports: the accuracy `acc` or the length-normalised `acc_norm`, the `perplexity` of
            its reference answers, or the `rougeL` of written ones.
        parse: Turns a row into a `Question`; raises `ValueError` that names the malformed field.
        hub: Where its rows are on the hub; None for the built-in task.
        template: The one wording that it is asked in, in words. Empty: --data.prompt_style says which.
        new_tokens: Tokens that a generated answer may have.
    """

    name: str
    metric: Metric
    parse: Callable[[Row], Question]
    hub: HubSource | None
    template: str = ""
    new_tokens: int = 16

    @property
    def written(self) -> bool:
        """Whether an answer is a text to be written, not one of several choices."""
        return self.metric in ("perplexity", "rougeL")

    @property
    def few_shot(self) -> Split | None:
        """The split whose first rows are examples to put before a question; None where answers are texts."""
        if self.written:
            return None
        return "dev" if self.hub is not None and self.hub.dev is not None else "train"

    @property
    def calibration(self) -> bool:
        """Whether it has calibration rows of its own, beside the training rows."""
        return self.hub is not None and self.hub.calibration is not None


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "piqa",
            "acc_norm",
            parse_piqa,
            HubSource("baber/piqa", "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1"),
        ),
        Task(
            "boolq",
            "acc",
            parse_boolq,
            # Without its passage a question is another task.
            HubSource("google/boolq", "35b264d03638db9f4ce671b711558bf7ff0f80d5", required=("passage",)),
        ),
        Task(
            "social_iqa",
            "acc",
            parse_social_iqa,
            HubSource("lighteval/siqa", "54c6a1f8cb6daf4f5abf24a601852612fb35eb25"),
        ),
        Task(
            "arc_easy",
            "acc_norm",
            parse_lettered("arc_easy", "question"),
            HubSource("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453", "ARC-Easy"),
        ),
        Task(
            "arc_challenge",
            "acc_norm",
            parse_lettered("arc_challenge", "question"),
            HubSource(
                "allenai/ai2_arc",
                "210d026faf9955653af8916fad021475a3f00453",
                "ARC-Challenge",
            ),
        ),
        Task(
            "winogrande",
            "acc",
            parse_winogrande,
            HubSource(
                "allenai/winogrande",
                "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
                "winogrande_xl",
            ),
        ),
        Task(
            "openbookqa",
            "acc_norm",
            parse_lettered("openbookqa", "question_stem"),
            HubSource("allenai/openbookqa", "388097ea7776314e93a529163e0fea805b8a6454", "main"),
        ),
        Task("facts", "acc", parse_lettered("facts", "question"), hub=None),
        Task(
            "mmlu",
            "acc",
            parse_mmlu,
            HubSource(
                "cais/mmlu",
                "c30699e8356da336a370243923dbaf21066bb9fe",
                "all",
                train="auxiliary_train",
                validation="test",
                calibration="validation",  # auxiliary_train has no subjects
                dev="dev",
            ),
            template="choice, as lm-evaluation-harness's mmlu",
        ),
        Task(
            "alpaca",
            "perplexity",
            parse_alpaca,
            # It has a training split only: its last 2,000 of 51,760 rows are held out.
            HubSource(
                "yahma/alpaca-cleaned",
                "12567cabf869d7c92e573c7c783905fc160e9639",
                train="train[:-2000]",
                validation="train[-2000:]",
                skip_empty="output",
            ),
            template="Stanford Alpaca's, with a line break after 'Response:'",
            new_tokens=128,
        ),
        Task(
            "samsum",
            "rougeL",
            parse_samsum,
            HubSource(
                "knkarthick/samsum",
                "f8040674894a743112febaddde2b32264c07bb20",
                validation="test",
                skip_empty="dialogue",
            ),
            template="'Summarize this dialog:', as in Meta's llama-recipes",
            new_tokens=96,
        ),
    )
}

SUITES: dict[str, tuple[str, ...]] = {
    "csqa": ("piqa", "boolq", "social_iqa", "arc_easy", "arc_challenge", "winogrande", "openbookqa"),
    "generality": ("mmlu", "alpaca", "samsum"),
}


def resolve_tasks(spec: str | Sequence[str]) -> tuple[str, ...]:
    """Task names of a task, a suite, a list of them, or a comma-separated string; each name once, in order.

    Raises:
        ValueError: A name is unknown, or none is given.
    """
    parts = [spec] if isinstance(spec, str) else list(spec)
    names: dict[str, None] = {}
    for name in (name.strip() for part in parts for name in part.split(",")):
        if name not in TASKS and name not in SUITES:
            known = ", ".join([*SUITES, *TASKS])
            raise ValueError(f"unknown task {name!r} (--data.tasks); known suites and tasks: {known}")
        names.update(dict.fromkeys(SUITES.get(name, (name,))))
    if not names:
        raise ValueError(
            f"no task given (--data.tasks); known suites and tasks: {', '.join([*SUITES, *TASKS])}"
        )
    return tuple(names)
