"""The losses: L = L_CE + Σ λ · L of the method's terms, such as L_ratio and L_entropy.

Every term is averaged within a sequence first, then over sequences: what D-LLM's one sequence a device amounts to.
So it depends neither on padding nor on how an effective batch is cut into micro-batches or over devices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over sequences of the mean over masked tokens, scalar from ``(B, T)`` and bool ``(B, T)``.

    A sequence without any masked token counts as 0.
    """
    totals = (values * mask).sum(1)
    return (totals / mask.sum(1).clamp_min(1)).mean()


def predicting(tokens: Tensor) -> Tensor:
    """Tokens that a real one follows, bool ``(B, T)`` from real tokens: D-LLM holds no others to the ratio."""
    return torch.nn.functional.pad(tokens[:, :-1] & tokens[:, 1:], (0, 1))


def answer_places(labels: Tensor) -> Tensor:
    """Flat places in ``(B, T)`` of tokens that an answer token follows, ``(M,)``, of labels ``(B, T)``, -100 elsewhere.

    Made where the batch is, before it moves to a GPU, which the host would wait for.
    """
    following = labels[:, 1:] != -100
    return torch.nn.functional.pad(following, (0, 1)).flatten().nonzero().squeeze(1)


def answer_loss(logits: Tensor, targets: Tensor, answer: Tensor) -> Tensor:
    """L_CE: cross-entropy in nats over answer tokens only.

    Args:
        logits: Of the positions that predict an answer token, in the batch's order, ``(M, V)``.
        targets: The tokens to predict there, ``(M,)``.
        answer: Which positions predict an answer token, bool ``(B, T)`` with M true.
    """
    nll = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    values = torch.zeros(answer.shape, dtype=nll.dtype, device=nll.device).masked_scatter(answer, nll)
    return sequence_mean(values, answer)


def ratio_loss(
    executed: Tensor,
    layers: int,
    target: float,
    free: Tensor,
    held: Literal["token", "sequence", "all"] = "token",
) -> Tensor:
    """L_ratio (D-LLM): mean over tokens of |share of all layers that the token executes − target|.

    Args:
        executed: Decisions about the routed layers, or how much of them tokens execute, ``(R, B, T)``.
        layers: Number of all layers; those without a router count as executed.
        target: R_target.
        free: Tokens that are held to it: none of padding, none that always execute, bool ``(B, T)``.
        held: What is held to the target, so that its distance counts: every token; the mean over each sequence's
            tokens, of which hard ones may execute more (after SkipGPT, arXiv 2506.04179); or the mean over all, whose
            signed excess is returned, since a mean over some of them, a micro-batch, has no distance of its own.
    """
    excess = (executed.sum(0) + (layers - len(executed))) / layers - target
    if held == "token":
        return sequence_mean(excess.abs(), free)
    if held == "sequence":
        return ((excess * free).sum(1) / free.sum(1).clamp_min(1)).abs().mean()
    return sequence_mean(excess, free)


def binary_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(g), ``(...)`` from logits ``(..., 2)``; at most ln 2."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def entropy_loss(logits: Tensor, free: Tensor) -> Tensor:
    """L_entropy (QTALE): minus the mean binary entropy of the routers' decisions, from logits ``(R, B, T, 2)``."""
    return -sequence_mean(binary_entropy(logits).mean(0), free)


@dataclass(frozen=True)
class Losses:
    """The terms of one batch, the method's by name, and their weighted sum; scalars."""

    ce: Tensor
    terms: Mapping[str, Tensor]
    total: Tensor

    @classmethod
    def weigh(cls, ce: Tensor, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> "Losses":
        """L = L_CE + Σ λ · L of the terms, with λ by their names."""
        return cls(ce, terms, sum((weights[name] * term for name, term in terms.items()), ce))
