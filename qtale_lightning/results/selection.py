"""What a sweep writes into `results.json`: the θ that it selected, and the searches that it made."""

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from qtale_lightning.results.fields import Bits, Count, Fraction, Number, Quantity, Thresholds
from qtale_lightning.results.fingerprints import Fingerprint


class Difference(TypedDict):
    """Of an average accuracy, paired by question: with its standard error and the ends of its 95 % interval."""

    value: Number
    stderr: Quantity
    low: Number
    high: Number


class Selected(TypedDict):
    """The θ chosen for one precision and the rule, in words. `engine` is needed where several share the bits.

    The report takes its figures from the validation row at this θ; those here are for whoever reads the JSON. The
    choice took `passes` over the calibration questions, of `seconds` in all; `budget` is the execution ratio asked for,
    and `difference` that of the calibration accuracy to full execution, where the rule goes by it.
    """

    bits: Bits
    engine: NotRequired[str]
    theta: Thresholds
    rule: str
    average: Fraction | None
    average_stderr: Quantity | None
    average_nll: Number
    execution_ratio: Fraction
    passes: NotRequired[Count]
    seconds: NotRequired[Quantity]
    budget: NotRequired[Fraction]
    difference: NotRequired[Difference]


class Search(TypedDict):
    """A search of θ for a budget, and the execution ratio that it reached on the calibration questions.

    `fingerprint` says which model and questions it was made with; older ones have none, and are made again.
    `perturbation` is that of its decisions, where they were perturbed.
    """

    bits: Bits
    engine: str
    rule: Literal["budget", "layer-budget"]
    budget: Fraction
    theta: Thresholds
    execution_ratio: Fraction
    passes: Count
    seconds: Quantity
    perturbation: NotRequired[dict[str, Number]]
    fingerprint: NotRequired[Fingerprint]


def search_key(search: Search) -> tuple[float, str, str, float]:
    """What no two searches on the same questions have in common: precision, rule and budget."""
    return search["bits"], search["engine"], search["rule"], search["budget"]
