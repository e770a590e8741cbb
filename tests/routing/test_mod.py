"""Mixture-of-Depths: a fixed capacity in training, the router's own forecast of it at inference."""

import pytest
import torch

from qtale_lightning.models import Routing
from qtale_lightning.routing import METHODS, Budget
from qtale_lightning.routing.methods.mod import top_tokens
from tests.routing.conftest import Make

MOD = METHODS["mod"]


def test_the_highest_scores_of_each_sequence_are_chosen_among_free_tokens() -> None:
    gap = torch.tensor([[9.0, 1.0, 3.0, 2.0, 8.0], [0.0, -3.0, -1.0, -2.0, 5.0]])
    logits = torch.stack([torch.zeros_like(gap), gap], -1)
    free = torch.tensor([[False, True, True, True, False], [False, True, True, True, True]])
    expected = [[0, 0, 1, 1, 0], [0, 0, 1, 0, 1]]  # 0.6 of 3 and of 4, to the nearest
    assert top_tokens(logits, free, 0.6).int().tolist() == expected
    assert torch.equal(top_tokens(logits, free, 1.0), free)
    assert not top_tokens(logits, free, 0.0).any()


def test_every_layer_has_its_capacity_in_training(make: Make) -> None:
    model = make("mod").train()
    tokens = torch.randint(3, 97, (3, 22), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[2, 12:] = 0
    for rate in (None, 0.25):  # the model's own, or the schedule's
        routing = Routing(rate=rate)
        model(tokens, attention_mask=mask, routing=routing)
        executed = (routing.stacked_gates() * routing.free).sum(-1)
        wanted = torch.tensor([20, 20, 10]) * (rate or 0.6)
        assert torch.equal(executed, wanted.round().expand(4, 3))


def test_the_loss_is_the_cross_entropy_of_membership() -> None:
    gap = torch.tensor([[5.0, 2.0, -1.0, 0.5]])
    routing = Routing(rate=1 / 3, free=torch.tensor([[False, True, True, True]]))
    routing.logits = {1: torch.stack([torch.zeros_like(gap), gap], -1)}
    p = gap.sigmoid()
    expected = -(p[0, 1].log() + (1 - p[0, 2]).log() + (1 - p[0, 3]).log()) / 3
    assert MOD.losses(routing, 2, Budget(0.5))["prediction"].item() == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_training_by_it_teaches_routers_to_foresee_their_capacity(make: Make) -> None:
    """Then p(execute) ≥ 0.5, which looks at no other token, executes the share that training fixed."""
    model = make("mod").train()
    routers = [p for name, p in model.named_parameters() if ".router." in name]
    optimizer = torch.optim.Adam(routers, lr=3e-2)
    tokens = torch.randint(3, 97, (16, 20), generator=torch.Generator().manual_seed(0))
    for _ in range(40):
        routing = Routing()
        model.model(tokens, routing=routing)
        MOD.losses(routing, 5, Budget(0.68))["prediction"].backward()
        optimizer.step()
        optimizer.zero_grad()
    error = MOD.statistics(routing)["prediction_error"]
    assert float(error) < 0.1
    routing = Routing()
    with torch.no_grad():
        model.eval()(tokens, routing=routing, use_cache=False)
    assert float(routing.stacked_gates()[:, routing.free].mean()) == pytest.approx(0.6, abs=0.06)


def test_theta_moves_what_executes(make: Make) -> None:
    model, tokens = make("mod"), torch.arange(3, 43)[None]
    ratios = []
    for theta in (0.0, 0.3, 0.7, 1.0):
        routing = Routing(threshold=theta)
        with torch.no_grad():
            model(tokens, routing=routing, use_cache=False)
        ratios.append(float(routing.stacked_gates().mean()))
    assert ratios[0] == 1
    assert ratios == sorted(ratios, reverse=True)
    assert len(set(ratios)) > 2
