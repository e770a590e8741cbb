"""What a task declares: where its rows are, how one becomes a question, and how that is asked and measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]
Split = Literal["train", "validation", "calibration", "dev"]
Style = Literal["cloze", "choice"]
Metric = Literal["acc", "acc_norm", "perplexity", "rougeL"]


@dataclass(frozen=True)
class Question:
    """One multiple-choice question, or a task to write a text for, whose one choice is the reference.

    Attributes:
        task: Name of its task.
        text: The question, a sentence with one blank `_`, an instruction or a dialogue.
        choices: Text of each choice, as the dataset has it.
        label: Index of the right choice.
        context: What it refers to (a passage, a situation, an instruction's input); empty where there is none.
        subject: The part of the task that it belongs to; empty where there are none.
    """

    task: str
    text: str
    choices: tuple[str, ...]
    label: int
    context: str = ""
    subject: str = ""


Cloze = Callable[[Question], Sequence[tuple[str, str]]]
"""A question as (context, answer) of each choice."""
Choice = Callable[[Question, Sequence[str]], str]
"""A question as the context that lists its choices by these labels."""


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


@dataclass(frozen=True, kw_only=True)
class Task:
    """Declaration of one task.

    Its rows are `<root>/<name>/<split>.jsonl` where --data.root is given; else those of its hub dataset, or what it
    makes itself. A task with neither has local rows only.

    Attributes:
        name: Name in configurations and folder name of its local files.
        title: Name in tables and figures.
        metric: What the task reports: the accuracy `acc` or the length-normalised `acc_norm`, the `perplexity` of
            its reference answers, or the `rougeL` of written ones.
        rows: Rows of its training split, to plan with when they aren't on this disk.
        parse: Turns a row into a `Question`; raises `ValueError` that names the malformed field.
        hub: Where its rows are on the hub.
        generate: Makes the questions of a split by a seed.
        cloze: Its wording where the text of each choice is scored, or the text that is to be written.
        choice: Its wording where choices are listed and their labels are scored. Of the two one may be None: the
            task is always asked by the other.
        header: What stands before all else, examples too.
        template: The one wording that it is asked in, in words. Empty: --data.prompt_style says which.
        new_tokens: Tokens that a generated answer may have.
        blank: In `cloze` choices fill a blank of the context, so that none can be written behind it.

    Raises:
        ValueError: It has no wording, or no rows to train on.
    """

    name: str
    metric: Metric
    rows: int
    parse: Callable[[Row], Question]
    cloze: Cloze | None = None
    choice: Choice | None = None
    header: Callable[[Question], str] = lambda question: ""
    title: str = ""
    hub: HubSource | None = None
    generate: Callable[[Split, int], list[Question]] | None = None
    template: str = ""
    new_tokens: int = 16
    blank: bool = False

    def __post_init__(self) -> None:
        if self.cloze is None and self.choice is None:
            raise ValueError(f"task {self.name!r} has no wording: declare `cloze`, `choice` or both")
        if self.rows < 1:
            raise ValueError(f"task {self.name!r}: rows {self.rows} must be at least 1")

    @property
    def written(self) -> bool:
        """Whether an answer is a text to be written, not one of several choices."""
        return self.metric in ("perplexity", "rougeL")

    def lists_choices(self, style: str) -> bool:
        """Whether its prompt lists the choices, where this style is asked for: it may have one wording only."""
        return self.choice is not None and (style == "choice" or self.cloze is None)

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
