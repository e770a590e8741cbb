"""Prompts of a question in two styles.

`cloze` scores the text of each choice, with the wording of lm-evaluation-harness (`lm_eval/tasks/*`); right
for small models. `choice` lists the choices and scores their letters; what 7B fine-tuning uses.
"""

from dataclasses import dataclass, replace
from string import ascii_uppercase

from qtale_lightning.data.tasks import Question

PROMPT_STYLES = ("cloze", "choice")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: one context and one continuation for each choice.

    Attributes:
        task: Name of the task.
        contexts: Text before the answer, one a choice. All the same, save for winogrande's cloze prompts.
        continuations: Scored text, one a choice; begins with a space.
        label: Index of the right choice.
        choice_lengths: Characters of each continuation without its leading space: what lm-evaluation-harness's
            `acc_norm` divides a log-likelihood by.
    """

    task: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    label: int
    choice_lengths: tuple[int, ...]

    def gold(self) -> "Prompt":
        """The same prompt with its right choice alone, which is all that training reads."""
        return replace(
            self,
            contexts=(self.contexts[self.label],),
            continuations=(self.continuations[self.label],),
            label=0,
            choice_lengths=(self.choice_lengths[self.label],),
        )


def build_prompt(question: Question, style: str) -> Prompt:
    """Prompt of a question in a style, `cloze` or `choice`.

    Raises:
        ValueError: The style is unknown, or a question has more choices than there are letters.
    """
    if style not in PROMPT_STYLES:
        raise ValueError(f"unknown prompt style {style!r}; known: {', '.join(PROMPT_STYLES)}")
    if style == "choice":
        contexts, answers = _choice(question)
    elif question.task == "winogrande":
        contexts, answers = _partial_evaluation(question)
    else:
        contexts, answers = (_cloze_context(question),) * len(question.choices), question.choices
    return Prompt(
        task=question.task,
        contexts=contexts,
        continuations=tuple(f" {answer}" for answer in answers),
        label=question.label,
        choice_lengths=tuple(len(answer) for answer in answers),
    )


def _cloze_context(question: Question) -> str:
    if question.task == "openbookqa":  # the stem is the beginning of a sentence that the choice ends
        return question.text
    if question.task == "social_iqa":
        return f"Q: {question.context} {question.text}\nA:"
    return f"{_passage(question)}Question: {_question_text(question)}\nAnswer:"


def _partial_evaluation(question: Question) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Winogrande: each choice fills the blank of its context, and the text after the blank is scored."""
    before, _, after = question.text.partition("_")
    return tuple(before + choice for choice in question.choices), (after.strip(),) * len(question.choices)


def _choice(question: Question) -> tuple[tuple[str, ...], tuple[str, ...]]:
    count = len(question.choices)
    if count > len(ascii_uppercase):
        raise ValueError(
            f"a question of task {question.task!r} has {count} choices, more than there are letters"
        )
    letters = tuple(ascii_uppercase[:count])
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, question.choices, strict=True))
    instruction = "Fill in the blank" if question.task == "winogrande" else "Question"
    context = f"{_passage(question)}{instruction}: {_question_text(question)}\n{options}\nAnswer:"
    return (context,) * count, letters


def _passage(question: Question) -> str:
    return f"{question.context}\n" if question.context else ""


def _question_text(question: Question) -> str:
    """The question's text; boolq's come without a question mark and get one."""
    if question.task == "boolq":
        return f"{question.text.rstrip().removesuffix('?')}?"
    return question.text
