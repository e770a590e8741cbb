"""How questions are asked, and how their answers are measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qtale_lightning.data.prompts import CHOICE_LABELS, PROMPT_STYLES, build_prompt
from qtale_lightning.data.tokenization import EncodedPrompt, encode_prompt
from qtale_lightning.tasks import TASKS, Question

if TYPE_CHECKING:  # what is planned and checked doesn't wait for it
    from transformers import PreTrainedTokenizerBase

ANSWERS = ("scored", "generated")
GENERATED_METRICS = ("acc_generated", "rougeL")  # those of a written answer


@dataclass(frozen=True)
class Asking:
    """The options of `CommonsenseDataModule` that say how its tasks are asked and answered, checked.

    Raises:
        ValueError: An option is unknown or out of its range, or doesn't fit the tasks.
    """

    tasks: tuple[str, ...]
    prompt_style: str
    choice_labels: str
    shots: int
    answers: str
    max_new_tokens: int | None
    generations: int

    def __post_init__(self) -> None:
        known = {"prompt_style": PROMPT_STYLES, "choice_labels": tuple(CHOICE_LABELS), "answers": ANSWERS}
        for option, values in known.items():
            value = getattr(self, option)
            if value not in values:
                words = option.replace("_", " ")
                raise ValueError(f"unknown {words} {value!r} (--data.{option}); known: {', '.join(values)}")
        chosen = [task for task in self.tasks if not TASKS[task].written]
        if self.shots and not chosen:
            raise ValueError(
                f"--data.shots {self.shots}: there are no examples for {', '.join(self.tasks)}; only tasks with "
                "choices have them"
            )
        blank = [
            name for name in chosen if TASKS[name].blank and not TASKS[name].lists_choices(self.prompt_style)
        ]
        if self.answers == "generated" and (blank or not chosen):
            raise ValueError(
                "--data.answers generated is for tasks with choices that can be written behind the prompt, which "
                f"{', '.join(blank or self.tasks)} has not: give --data.prompt_style choice, or leave it out"
            )

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        question: Question,
        max_length: int,
        examples: Sequence[Question] = (),
        gold_only: bool = False,
    ) -> EncodedPrompt:
        """Token ids of a question with its examples and all choices, or its right choice alone.

        Raises:
            ValueError: as `build_prompt` and `encode_prompt`.
        """
        prompt = build_prompt(question, self.prompt_style, self.choice_labels, examples)
        return encode_prompt(tokenizer, prompt.gold() if gold_only else prompt, max_length)

    def metrics(self, split: Literal["validation", "calibration"] = "validation") -> dict[str, str]:
        """What each task is measured by.

        Nothing is generated for calibration questions, since log-likelihoods suffice to select θ: what is to be
        written is measured there by the reference's perplexity.
        """
        metrics: dict[str, str] = {task: TASKS[task].metric for task in self.tasks}
        for task in self.tasks:
            if TASKS[task].written and split == "calibration":
                metrics[task] = "perplexity"
            elif not TASKS[task].written and split == "validation" and self.answers == "generated":
                metrics[task] = "acc_generated"
        return metrics

    def to_generate(self, questions: Sequence[EncodedPrompt]) -> dict[str, list[int]]:
        """Indices of the validation questions that are answered in writing, by task."""
        metrics = self.metrics()
        chosen: dict[str, list[int]] = {}
        for index, question in enumerate(questions):
            metric, rows = metrics[question.task], chosen.get(question.task, [])
            if metric in GENERATED_METRICS or (metric == "perplexity" and len(rows) < self.generations):
                chosen[question.task] = [*rows, index]
        return chosen

    def check_written(self, schedule: str) -> None:
        """Refuses a schedule of bits where it would change no result: no task's measure is of a written answer.

        Raises:
            ValueError: None is.
        """
        if not set(self.metrics().values()) & {*GENERATED_METRICS}:
            raise ValueError(
                f"the schedule {schedule} is of answers in writing, but those of {', '.join(self.tasks)} are "
                "scored: give --data.answers generated, or tasks whose answers are written, such as samsum"
            )

    def new_tokens(self, task: str) -> int:
        """Tokens that a generated answer of a task may have."""
        return self.max_new_tokens or TASKS[task].new_tokens

    def record(self) -> dict[str, Any]:
        """What belongs to the protocol of every result."""
        record: dict[str, Any] = {
            "prompt_style": self.prompt_style,
            "choice_labels": self.choice_labels,
            "shots": self.shots,
            "answers": self.answers,
            "tasks": list(self.tasks),
            "metrics": self.metrics(),
        }
        if templates := {task: TASKS[task].template for task in self.tasks if TASKS[task].template}:
            record["templates"] = templates
        return record
