"""The loss terms against values computed by hand, and what they must not depend on."""

import math

import pytest
import torch
from torch import Tensor

from qtale_lightning.losses import (
    Losses,
    answer_loss,
    binary_entropy,
    entropy_loss,
    predicting,
    ratio_loss,
    sequence_mean,
)


def test_ratio_loss_by_hand() -> None:
    # 4 layers, 2 of them routed. Token shares: (1+0+2)/4 = .75, (1+1+2)/4 = 1, (0+0+2)/4 = .5; target .5.
    gates = torch.tensor([[[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]], [[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]])
    free = torch.tensor([[True, True, True], [False, True, False]])
    # Sequence 1: (.25 + .5 + 0) / 3; sequence 2 counts its one free token: share .75, so .25.
    assert ratio_loss(gates, 4, 0.5, free).item() == pytest.approx((0.25 + 0.25) / 2)


def test_the_ratio_of_a_sequence_or_of_all_by_hand() -> None:
    # Shares .75, 1 and .5 of the tokens of both sequences; the last of the first doesn't count.
    gates = torch.tensor([[[1.0, 1.0, 0.0]] * 2, [[0.0, 1.0, 0.0]] * 2])
    free = torch.tensor([[True, True, False], [True, True, True]])
    assert ratio_loss(gates, 4, 0.75, free).item() == pytest.approx(
        ((0 + 0.25) / 2 + (0 + 0.25 + 0.25) / 3) / 2
    )
    assert ratio_loss(gates, 4, 0.75, free, "sequence").item() == pytest.approx((0.25 / 2 + 0) / 2)
    assert ratio_loss(gates, 4, 0.9, free, "all").item() == pytest.approx((0.875 - 0.9 + 0.75 - 0.9) / 2)


def test_only_tokens_that_a_real_one_follows_are_held_to_the_ratio() -> None:
    """On either side of padding, as D-LLM's code pairs the decisions of one token with the mask of the next."""
    tokens = torch.tensor([[True, True, True, False], [False, True, True, True]])
    expected = torch.tensor([[True, True, False, False], [False, True, True, False]])
    assert torch.equal(predicting(tokens), expected)


def test_entropy_loss_by_hand() -> None:
    logits = torch.tensor([[[[0.0, 0.0], [0.0, math.log(3.0)]]]])  # p = .5 and .75
    quarter = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy_loss(logits, torch.tensor([[True, True]])).item() == pytest.approx(
        -(math.log(2) + quarter) / 2
    )
    assert entropy_loss(logits, torch.tensor([[True, False]])).item() == pytest.approx(-math.log(2))


def test_binary_entropy_of_extreme_logits_is_finite() -> None:
    value = binary_entropy(torch.tensor([[-1e4, 1e4]], requires_grad=True))
    value.sum().backward()
    assert value.item() == 0.0


def test_answer_loss_by_hand() -> None:
    targets = torch.tensor([[-100, 1, 0], [1, -100, -100]])
    answer = targets != -100
    logits = torch.tensor(
        [[0.0, math.log(3.0)], [0.0, 0.0], [math.log(3.0), 0.0]]
    )  # p(target) = 3/4, 1/2, 1/4
    expected = ((-math.log(3 / 4) - math.log(1 / 2)) / 2 - math.log(1 / 4)) / 2
    assert answer_loss(logits, targets[answer], answer).item() == pytest.approx(expected)


def test_total_is_the_weighted_sum() -> None:
    one, two, three = (torch.tensor(float(i)) for i in (1, 2, 3))
    assert Losses.weigh(one, {"a": two, "b": three}, {"a": 5.0, "b": 0.5}).total.item() == 1 + 5 * 2 + 0.5 * 3


def random_case(batch: int = 4, length: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, batch, length, 2, generator=generator)
    gates = (logits[..., 1] > logits[..., 0]).float()
    free = torch.arange(length) < torch.tensor([7, 5, 3, 1])[:, None]
    return logits, gates, free


def test_terms_do_not_depend_on_padding() -> None:
    logits, gates, free = random_case()
    wider = torch.nn.functional.pad
    more = {"free": wider(free, (0, 5)), "gates": wider(gates, (0, 5), value=1.0)}
    assert ratio_loss(more["gates"], 5, 0.5, more["free"]).item() == pytest.approx(
        ratio_loss(gates, 5, 0.5, free).item()
    )
    padded = wider(logits, (0, 0, 0, 5), value=3.0)
    assert entropy_loss(padded, more["free"]).item() == pytest.approx(entropy_loss(logits, free).item())


def test_terms_are_means_over_sequences_so_micro_batches_add_up() -> None:
    logits, gates, free = random_case()
    for whole, parts in (
        (
            ratio_loss(gates, 5, 0.5, free),
            [ratio_loss(gates[:, i : i + 1], 5, 0.5, free[i : i + 1]) for i in range(4)],
        ),
        (entropy_loss(logits, free), [entropy_loss(logits[:, i : i + 1], free[i : i + 1]) for i in range(4)]),
    ):
        assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), abs=1e-6)


def test_a_sequence_without_free_tokens_counts_as_zero() -> None:
    values = torch.ones(2, 3)
    assert sequence_mean(values, torch.tensor([[True, True, True], [False] * 3])).item() == pytest.approx(0.5)
