"""The ratio as a constraint: its multiplier by hand, its gradient, and where it settles."""

import pytest
import torch

from qtale_lightning.models.routing import Routing
from qtale_lightning.training import Multiplier
from tests.test_module import make_batch, make_module, stepping
from tests.tolerance import close


def test_ascent_by_hand() -> None:
    multiplier = Multiplier(0.5)
    for excess in (0.4, 0.2):  # of two micro-batches of a step
        multiplier.observe(torch.tensor(excess))
    multiplier.ascend(float(multiplier.excess()))
    assert multiplier.value == pytest.approx(0.5 * 0.3)
    assert not multiplier.observed
    multiplier.ascend(-1.0)
    assert multiplier.value == 0.0


def test_it_takes_the_place_of_lambda() -> None:
    module, batch = stepping(make_module(ratio_ascent=0.5), 10, 20), make_batch()
    module.multiplier.value = 3.0
    lambdas = module.scheduled_lambdas()
    assert lambdas["ratio"] == 3.0
    routing = Routing(sample=False, execution="masked")
    losses = module.losses(batch, routing, 0.25, lambdas)
    layers, free = len(module.model.model.layers), routing.free
    following = torch.nn.functional.pad(routing.tokens[:, 1:], (0, 1))
    counted = free & following
    executed = (routing.stacked_gates().sum(0) + layers - len(routing.gates)) / layers
    mean = ((executed * counted).sum(1) / counted.sum(1)).mean()
    close(losses.terms["ratio"], mean - 0.25, 2)
    assert (
        module.losses(batch, Routing(sample=False, execution="masked"), 0.25).terms["ratio"] >= 0
    )  # validation's


def test_the_constraint_is_met() -> None:
    """Execution is worth something, so it falls to the target and not below: p = σ(x) of cost (1 − p)²."""
    multiplier, x = Multiplier(0.2), torch.tensor(3.0, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=1.0)
    for _ in range(2000):
        excess = x.sigmoid() - 0.5
        loss = (1 - x.sigmoid()) ** 2 + multiplier.value * excess
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        multiplier.observe(excess)
        multiplier.ascend(float(multiplier.excess()))
    assert x.sigmoid().item() == pytest.approx(0.5, abs=1e-2)
    assert multiplier.value == pytest.approx(
        1.0, abs=5e-2
    )  # 2 · (1 − p), what the last bit of execution is worth
