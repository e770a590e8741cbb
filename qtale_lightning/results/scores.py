"""A task's scores in `results.json`: which keys they have depends on the metric that the task reports."""

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from qtale_lightning.results.fields import Count, Fraction, Number, Quantity


class SubjectAccuracy(TypedDict):
    """Accuracy on one subject of a task."""

    value: Fraction
    stderr: Quantity
    examples: Count


class ChoiceScores(TypedDict):
    """Of questions with choices. `value` and `stderr` are those of `metric`, the accuracy that the task reports.

    `acc` and `acc_norm` are by log-likelihood. `acc_generated` is that of written answers, of which the share
    `unreadable` can't be read and counts as wrong. `nll` is a mean over questions, in nats a token of the right choice.
    `subjects` are a task's parts, which weigh by their number of questions.
    """

    value: Fraction
    stderr: Quantity
    metric: Literal["acc", "acc_norm", "acc_generated"]
    nll: Number
    nll_stderr: NotRequired[Quantity]
    acc: Fraction
    acc_norm: Fraction
    unreadable: NotRequired[Fraction]
    subjects: NotRequired[dict[str, SubjectAccuracy]]
    examples: Count


class TextScores(TypedDict):
    """Of texts. `perplexity` is exp(`nll`), and `nll` the total over all `tokens` of the references, EOS not counted.

    The higher ROUGE (F1 in 0..1) is better, the lower perplexity.
    """

    value: Quantity
    stderr: Quantity
    metric: Literal["perplexity", "rougeL"]
    nll: Number
    nll_stderr: Quantity
    perplexity: Quantity
    perplexity_stderr: Quantity
    tokens: Count
    rouge1: NotRequired[Fraction]
    rouge1_stderr: NotRequired[Quantity]
    rouge2: NotRequired[Fraction]
    rouge2_stderr: NotRequired[Quantity]
    rougeL: NotRequired[Fraction]
    rougeL_stderr: NotRequired[Quantity]
    examples: Count


TaskScores = Annotated[ChoiceScores | TextScores, Field(discriminator="metric")]
"""One task's scores, told apart by their metric."""
