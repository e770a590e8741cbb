"""Execution paths: which layers a token executes, and how many different ways a model really uses.

A token's path is its vector of decisions over the routed layers, or what is decided about in their place.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

WORD = 62
"""Decisions in one integer of a path's code: what int64 holds without its sign."""

SAMPLE = 500
"""Tokens that statistics of different numbers of tokens are brought to, so that they can be compared."""


def path_distance(ratios: Sequence[float]) -> float:
    """How diverse paths are, by the share of tokens r_l that execute each layer: the one measure to compare models by.

        (1 / L) Σ_l 2 r_l (1 − r_l)

    That is the share of all layers in which the paths of two tokens differ on average, their mean pairwise Hamming
    distance: nucleotide diversity (Nei and Li, 1979), a case of Rao's quadratic entropy (1982). It is 0 where all
    tokens have one path. Where each token executes a share r of the layers, it is 2 r (1 − r) at most, if no layer is
    executed by more of them than another. Unlike the number of paths, and their entropy, it depends on no number of
    tokens, and has no ceiling that the paths of thirty layers come to.

    Args:
        ratios: r_l of all L layers, 1 where every token executes them.
    """
    return sum(2 * ratio * (1 - ratio) for ratio in ratios) / len(ratios)


def path_codes(decisions: Tensor) -> Tensor:
    """Integers that are equal iff paths are, ``(N, ⌈R / 62⌉)`` int64 from decisions bool ``(R, N)``."""
    words = [
        (word.long() << torch.arange(len(word), device=word.device)[:, None]).sum(0)
        for word in decisions.split(WORD)
    ]
    return torch.stack(words, dim=1)


def path_statistics(codes: Tensor, layers: int) -> dict[str, float]:
    """How diverse paths are.

    Both numbers grow with the number of tokens that they are counted on. So they are also given for 500 tokens: their
    expectation over all samples of that size, drawn without replacement (rarefaction; Hurlbert, 1971), which is exact.

    Args:
        codes: Of N tokens, `path_codes`.
        layers: R, the number of routed layers.

    Returns:
        ``tokens``; ``distinct`` paths; the ``entropy`` of their distribution in nats, and as a share of the largest
        that N tokens of R decisions can have, min(ln N, R ln 2), ``entropy_share``; and ``distinct_of_500`` and
        ``entropy_of_500`` where there are as many tokens.
    """
    _, counts = codes.unique(dim=0, return_counts=True)
    tokens, share = len(codes), counts.double() / max(1, len(codes))
    entropy = float(-(share * share.log()).sum())
    capacity = min(math.log(max(1, tokens)), layers * math.log(2))
    statistics: dict[str, float] = {
        "tokens": tokens,
        "distinct": len(counts),
        "entropy": max(0.0, entropy),  # a single path gives -0.0
        "entropy_share": min(1.0, max(0.0, entropy) / capacity) if capacity else 0.0,
    }
    if tokens >= SAMPLE:
        distinct, entropy = rarefied(counts, SAMPLE)
        statistics |= {f"distinct_of_{SAMPLE}": distinct, f"entropy_of_{SAMPLE}": entropy}
    return statistics


def rarefied(counts: Tensor, size: int) -> tuple[float, float]:
    """Expected distinct paths and expected entropy (nats) of ``size`` of the tokens, drawn without replacement.

    A path of c of the N tokens is drawn m times with the hypergeometric probability
    C(c, m) C(N − c, size − m) / C(N, size).

    Args:
        counts: Tokens of each path, ``(K,)``, N together.
        size: At most N.
    """
    total = counts.sum().double()
    # Paths of equally many tokens have the same probabilities.
    sizes, alike = (x.double()[:, None] for x in counts.unique(return_counts=True))
    drawn = torch.arange(1, size + 1, dtype=torch.float64, device=counts.device)
    whole = _log_choose(total, torch.full_like(drawn, size))
    probability = (_log_choose(sizes, drawn) + _log_choose(total - sizes, size - drawn) - whole).exp() * alike
    share = drawn / size
    return float(probability.sum()), max(0.0, float(-(probability * share * share.log()).sum()))


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    """ln C(n, k) in float64; −inf where k > n."""
    possible = k <= n
    rest = torch.where(possible, n - k, 0.0)
    value = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(rest + 1)
    return torch.where(possible, value, -math.inf)


class PathDiversity(Metric):
    """`path_statistics` of all tokens that were seen, over all batches and processes."""

    codes: list[Tensor]
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layers = 0
        # Codes, not counts: which paths there are differs between processes.
        self.add_state("codes", [], dist_reduce_fx="cat")

    def update(self, decisions: Tensor) -> None:
        """Add the paths of N tokens, bool ``(R, N)``."""
        self.layers = len(decisions)
        self.codes.append(path_codes(decisions))

    def compute(self) -> dict[str, float]:
        """See `path_statistics`; needs an update."""
        return path_statistics(dim_zero_cat(self.codes), self.layers)
