"""Prompts of a question in two styles, and those of tasks that have one wording of their own.

`cloze` scores the text of each choice, with the wording of lm-evaluation-harness (`lm_eval/tasks/*`); right
for small models. `choice` lists the choices and scores their letters or numbers; what 7B fine-tuning uses. mmlu is
always asked by choice, in the harness's words. Examples may stand before a question, as in the harness. alpaca and
samsum ask for a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase

from qtale_lightning.data.parsing import Question
from qtale_lightning.data.tasks import TASKS

PROMPT_STYLES = ("cloze", "choice")
CHOICE_LABELS = {"letters": tuple(ascii_uppercase), "numbers": tuple(str(n) for n in range(1, 27))}

# Stanford Alpaca's words (tatsu-lab/stanford_alpaca, train.py), which end in "Response:". The line break after it is
# torchtune's: tokenizers split there, while a quote or bracket that opens an answer would melt with the colon.
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_ALPACA_PAIRED = ", paired with an input that provides further context"
_SAMSUM = "Summarize this dialog:\n{dialogue}\n---\nSummary:\n"  # meta-llama/llama-recipes


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: one context and one continuation for each choice.

    Attributes:
        task: Name of the task.
        contexts: Text before the answer, one a choice. All the same, save for winogrande's cloze prompts.
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
        style: `cloze` or `choice`; of no effect on mmlu, alpaca and samsum.
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
    before = _about(question) + "".join(_example(shot, style, labels) for shot in shots)
    return replace(prompt, contexts=tuple(before + context for context in prompt.contexts), shots=len(shots))


def _ask(question: Question, style: str, labels: str) -> Prompt:
    """A question without anything before it."""
    task, count, space = question.task, len(question.choices), " "
    contexts: tuple[str, ...]
    shown: tuple[str, ...] = ()
    if TASKS[task].written:
        context = _alpaca(question) if task == "alpaca" else _SAMSUM.format(dialogue=question.text)
        contexts, answers, space = (context,), question.choices, ""
    elif task == "mmlu" or style == "choice":
        shown = answers = _labels(question, labels)
        context = _mmlu(question, shown) if task == "mmlu" else _choice(question, shown)
        contexts = (context,) * count
    elif task == "winogrande":
        contexts, answers = _partial_evaluation(question)
    else:
        contexts, answers = (_cloze_context(question),) * count, question.choices
    return Prompt(
        task=task,
        contexts=contexts,
        continuations=tuple(f"{space}{answer}" for answer in answers),
        label=question.label,
        choice_lengths=tuple(len(answer) for answer in answers),
        choices=question.choices,
        labels=shown,
        subject=question.subject,
    )


def _example(question: Question, style: str, labels: str) -> str:
    """A question with its right answer, in front of another one."""
    prompt = _ask(question, style, labels)
    return f"{prompt.contexts[prompt.label]}{prompt.continuations[prompt.label]}\n\n"


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


def _labels(question: Question, kind: str) -> tuple[str, ...]:
    count = len(question.choices)
    if count > len(CHOICE_LABELS[kind]):
        raise ValueError(
            f"a question of task {question.task!r} has {count} choices, more than there are {kind}"
        )
    return CHOICE_LABELS[kind][:count]


def _choice(question: Question, labels: Sequence[str]) -> str:
    instruction = "Fill in the blank" if question.task == "winogrande" else "Question"
    asked = f"{_passage(question)}{instruction}: {_question_text(question)}"
    return f"{asked}\n{_options(question, labels)}\nAnswer:"


def _options(question: Question, labels: Sequence[str]) -> str:
    return "\n".join(f"{label}. {text}" for label, text in zip(labels, question.choices, strict=True))


def _about(question: Question) -> str:
    """What stands before all else: the harness's description of an mmlu subject."""
    if question.task != "mmlu":
        return ""
    about = f" about {question.subject.replace('_', ' ')}" if question.subject else ""
    return f"The following are multiple choice questions (with answers){about}.\n\n"


def _mmlu(question: Question, labels: Sequence[str]) -> str:
    return f"{question.text}\n{_options(question, labels)}\nAnswer:"


def _alpaca(question: Question) -> str:
    paired, given = (_ALPACA_PAIRED, f"### Input:\n{question.context}\n\n") if question.context else ("", "")
    return _ALPACA.format(paired=paired, instruction=question.text, input=given)


def _passage(question: Question) -> str:
    return f"{question.context}\n" if question.context else ""


def _question_text(question: Question) -> str:
    """The question's text; boolq's come without a question mark and get one."""
    if question.task == "boolq":
        return f"{question.text.rstrip().removesuffix('?')}?"
    return question.text
