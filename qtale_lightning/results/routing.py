"""What `results.json` says of routers: how they decide, how diverse paths are, and what quantization changes."""

from typing import NotRequired

from typing_extensions import TypedDict

from qtale_lightning.results.fields import Bits, Count, Fraction, Number, Quantity


class PathStatistics(TypedDict):
    """How many different paths tokens take; a path is a token's vector of decisions over the routed layers.

    `entropy` is that of the distribution of paths, in nats, and `entropy_share` the same as a share of the largest that
    so many tokens can have. Both, and `distinct`, depend on the number of tokens; what is expected of 500 of them
    doesn't, and is missing where there are fewer.
    """

    tokens: Count
    distinct: Count
    entropy: Quantity
    entropy_share: Fraction
    distinct_of_500: NotRequired[Quantity]
    entropy_of_500: NotRequired[Quantity]


class HistogramCounts(TypedDict):
    """Counts in bins between `edges`, one more; the outer bins hold what lies beyond them, too."""

    edges: list[Number]
    counts: list[Count]


class Routing(TypedDict):
    """How tokens' layers are decided at the end of training; a run where nothing is has no such section.

    Of the last training batches, where the method has it: `flip_ratio`, the share of decisions that Gumbel noise flips,
    `prediction_error`, the share that a layer's fixed capacity takes otherwise than its router foresees, `logit_gap`,
    the mean distance between the execute and the skip logit, and `entropy`, the mean binary entropy in nats;
    `execution_ratio_per_layer` and `flip_ratio_per_layer` (None where there is no router) have shape `(layers,)`.

    Of the last validation, on held-out training rows: the `histograms` of `logit_gap` (execute − skip) and of
    `probability`, p(execute), over tokens and layers, and the `paths` as inference decides (p(execute) ≥ 0.5) and as
    Gumbel noise would (`noisy_paths`).
    """

    flip_ratio: NotRequired[Fraction]
    prediction_error: NotRequired[Fraction]
    logit_gap: NotRequired[Quantity]
    entropy: NotRequired[Quantity]
    execution_ratio_per_layer: list[Fraction]
    flip_ratio_per_layer: NotRequired[list[Fraction | None]]
    histograms: NotRequired[dict[str, HistogramCounts]]
    paths: NotRequired[PathStatistics]
    noisy_paths: NotRequired[PathStatistics]


class Changes(TypedDict):
    """What a precision decides otherwise than 16 bits, at the same θ on the same tokens of validation questions.

    `tokens` are those that routers decide about. `decisions_changed` is a share of their decisions,
    `paths_changed` a share of the tokens: those with any changed decision. `flip_ratio` is the share of this model's
    decisions that Gumbel noise would flip, for comparison. `nll` is that of the gold answers in nats a token, mean over
    questions, and `nll_same_decisions` the same with the 16-bit model's decisions forced on this one; the `stderr` is
    that of their difference, paired by question. `changed_per_layer` has shape `(layers,)`, None without a router.
    `questions` is the digest of the tokens.
    """

    bits: Bits
    engine: str
    theta: Fraction
    questions: NotRequired[str]
    examples: Count
    tokens: Count
    execution_ratio: Fraction
    decisions_changed: Fraction
    paths_changed: Fraction
    changed_per_layer: list[Fraction | None]
    flip_ratio: Fraction
    paths: PathStatistics
    nll: Quantity
    nll_same_decisions: Quantity
    nll_difference_stderr: Quantity
