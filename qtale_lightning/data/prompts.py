"""Prompts of a question in two styles; a task may have one wording only.

`cloze` scores the text of each choice; right for small models. `choice` lists the choices and scores their letters or
numbers; what 7B fine-tuning uses. Examples may stand before a question, as in lm-evaluation-harness. The words are each
task's own (:mod:`qtale_lightning.tasks`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase

from qtale_lightning.tasks import TASKS, Question

PROMPT_STYLES = ("cloze", "choice")
CHOICE_LABELS = {"letters": tuple(ascii_uppercase), "numbers": tuple(str(n) for n in range(1, 27))}


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: one context and one continuation for each choice.

    Attributes:
        task: Name of the task.
        contexts: Text before the answer, one a choice. All the same, unless choices fill a blank.
        continuations: Scored text, one a choice; begins with a space, or follows a line break.
        label: Index of the right choice.
        choice_lengths: Characters of each continuation without its leading space: what lm-evaluation-harness's
            `acc_norm` divides a log-likelihood by.
        choices: Text of each choice.
        labels: What each choice is called in the context; empty where choices aren't listed.
        subject: The question's, see `Question`.
        shots: Examples before the question.
    """

    task: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    label: int
    choice_lengths: tuple[int, ...]
    choices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    subject: str = ""
    shots: int = 0

    def gold(self) -> "Prompt":
        """The same prompt with its right choice alone, which is all that training reads."""
        return replace(
            self,
            contexts=(self.contexts[self.label],),
            continuations=(self.continuations[self.label],),
            label=0,
            choice_lengths=(self.choice_lengths[self.label],),
            choices=self.choices[self.label : self.label + 1],
            labels=self.labels[self.label : self.label + 1],
        )


def build_prompt(
    question: Question, style: str, labels: str = "letters", shots: Sequence[Question] = ()
) -> Prompt:
    """Prompt of a question.

    Args:
        question: What is asked.
        style: `cloze` or `choice`; of no effect on a task with one wording.
        labels: What choices are called, `letters` or `numbers`.
        shots: Examples before the question: its own task's, of tasks with choices.

    Raises:
        ValueError: The style or the kind of labels is unknown, a question has more choices than there are labels, or
            the task takes no examples.
    """
    if style not in PROMPT_STYLES:
        raise ValueError(f"unknown prompt style {style!r}; known: {', '.join(PROMPT_STYLES)}")
    if labels not in CHOICE_LABELS:
        raise ValueError(f"unknown choice labels {labels!r}; known: {', '.join(CHOICE_LABELS)}")
    if shots and TASKS[question.task].written:
        raise ValueError(f"task {question.task!r} takes no examples before its questions")
    prompt = _ask(question, style, labels)
    before = TASKS[question.task].header(question) + "".join(_example(shot, style, labels) for shot in shots)
    return replace(prompt, contexts=tuple(before + context for context in prompt.contexts), shots=len(shots))


def _ask(question: Question, style: str, labels: str) -> Prompt:
    """A question without anything before it."""
    task = TASKS[question.task]
    shown: tuple[str, ...] = ()
    if task.choice is not None and task.lists_choices(style):
        shown = _labels(question, labels)
        context = task.choice(question, shown)
        asked = [(context, label) for label in shown]
    else:
        assert task.cloze is not None
        asked = [*task.cloze(question)]
    space = "" if task.written else " "
    return Prompt(
        task=question.task,
        contexts=tuple(context for context, _ in asked),
        continuations=tuple(f"{space}{answer}" for _, answer in asked),
        label=question.label,
        choice_lengths=tuple(len(answer) for _, answer in asked),
        choices=question.choices,
        labels=shown,
        subject=question.subject,
    )


def _example(question: Question, style: str, labels: str) -> str:
    """A question with its right answer, in front of another one."""
    prompt = _ask(question, style, labels)
    return f"{prompt.contexts[prompt.label]}{prompt.continuations[prompt.label]}\n\n"


def _labels(question: Question, kind: str) -> tuple[str, ...]:
    count = len(question.choices)
    if count > len(CHOICE_LABELS[kind]):
        raise ValueError(
            f"a question of task {question.task!r} has {count} choices, more than there are {kind}"
        )
    return CHOICE_LABELS[kind][:count]
