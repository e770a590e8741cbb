"""Training in two stages, by learning rates: some weights begin, the others join while those go on slowly.

SkipGPT (arXiv 2506.04179) trains routers alone, then LoRA with the routers frozen, and reports joint training as
unstable. Here are both orders, and what began goes on at a tenth of its rate. LoRA that begins does so at full depth:
nothing is skipped while no router learns.
"""

import math
from collections.abc import Callable

FIRST = {"lora-first": "weights", "routers-first": "routers"}

SECOND = 0.5  # share of the training behind which the second stage begins; ours
SLOW = 0.1  # of its rate, at which goes on what began; ours


def staged_rate(stages: str, group: str, steps: int, warmup: float) -> Callable[[int], float]:
    """A group's learning rate by step, as a share of its peak: linear warm-up, then cosine, in each stage.

    Args:
        stages: ``lora-first`` or ``routers-first``.
        group: Its name begins with ``weights`` or ``routers``.
        steps: Of the training.
        warmup: Share of a stage that is warm-up.
    """
    begins = group.startswith(FIRST[stages])

    def rate(step: int) -> float:
        early, late = step / steps / SECOND, (step / steps - SECOND) / (1 - SECOND)
        if begins:
            return SLOW + (1 - SLOW) * _cosine(early, warmup) if late < 0 else SLOW * _cosine(late, 0.0)
        return 0.0 if late < 0 else _cosine(late, warmup)

    return rate


def routed_progress(stages: str, progress: float) -> float:
    """Share of the part of the training in which tokens skip layers that is done; negative before it."""
    return (progress - SECOND) / (1 - SECOND) if stages == "lora-first" else progress


def _cosine(progress: float, warmup: float) -> float:
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / max(1 - warmup, 1e-9))))
