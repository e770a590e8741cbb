"""Wordings that tasks share: those of lm-evaluation-harness (`lm_eval/tasks/*`), and lists of choices."""

from collections.abc import Callable, Sequence

from qtale_lightning.tasks.task import Cloze, Question


def each_choice(context: Callable[[Question], str]) -> Cloze:
    """The same context for each choice, which is the answer."""
    return lambda question: [(context(question), choice) for choice in question.choices]


def cloze(question: Question) -> Sequence[tuple[str, str]]:
    """ "Question: … Answer:", after the passage where there is one; each choice is an answer."""
    context = f"{passage(question)}Question: {question.text}\nAnswer:"
    return [(context, choice) for choice in question.choices]


def choice(question: Question, labels: Sequence[str], instruction: str = "Question") -> str:
    """The same with the choices listed; a label is the answer."""
    return f"{passage(question)}{instruction}: {question.text}\n{options(question, labels)}\nAnswer:"


def options(question: Question, labels: Sequence[str]) -> str:
    """The choices, a line each."""
    return "\n".join(f"{label}. {text}" for label, text in zip(labels, question.choices, strict=True))


def passage(question: Question) -> str:
    """What a question refers to, a line of its own; nothing where it refers to nothing."""
    return f"{question.context}\n" if question.context else ""
