"""Two stages: learning rates by hand, and what the first stage trains."""

from typing import Any

import pytest
import torch

from qtale_lightning.models.routing import Routing
from qtale_lightning.training import staged_rate
from tests.test_module import make_batch, make_module, stepping


@pytest.mark.parametrize("stages", ["lora-first", "routers-first"])
def test_rates_by_hand(stages: str) -> None:
    first, second = ("weights", "routers")[:: 1 if stages == "lora-first" else -1]
    early, late = (staged_rate(stages, group, 100, 0.2) for group in (f"{first}-vectors", second))
    assert [early(step) for step in (0, 5, 10)] == pytest.approx([0.1, 0.1 + 0.9 * 0.5, 1.0])
    assert [early(step) for step in (50, 75, 100)] == pytest.approx(
        [0.1, 0.05, 0.0]
    )  # a tenth, then cosine to 0
    assert early(49) == pytest.approx(0.1, abs=1e-2)
    assert [late(step) for step in (0, 30, 49, 50)] == [0.0] * 4
    assert [late(step) for step in (55, 60, 80, 100)] == pytest.approx([0.5, 1.0, 0.5, 0.0])


def step(module: Any, batch: dict[str, torch.Tensor]) -> Routing:
    """What a training step decided, its gradients left behind."""
    seen: list[Routing] = []
    losses = module.losses
    module.losses = lambda batch, routing, *args: seen.append(routing) or losses(batch, routing, *args)
    module.log = module.log_dict = lambda *args, **kwargs: None
    module.training_step(batch, 0).backward()
    return seen[0]


def test_lora_begins_at_full_depth() -> None:
    module, batch = make_module(stages="lora-first", target_ratio=0.4, ratio_schedule=0.5), make_batch()
    routing = step(stepping(module, 9, 20), batch)
    assert all(torch.equal(gate.bool(), routing.tokens) for gate in routing.gates.values())
    for name, parameter in module.model.named_parameters():
        if ".router." in name:
            assert parameter.grad is None or not parameter.grad.any(), name
        elif parameter.requires_grad:
            assert parameter.grad.any(), name
    module = make_module(stages="lora-first", target_ratio=0.4, ratio_schedule=0.5)
    routing = step(stepping(module, 10, 20), batch)
    assert not all(torch.equal(gate.bool(), routing.tokens) for gate in routing.gates.values())
    assert stepping(module, 15, 20).scheduled(0.4) == pytest.approx(0.4)  # half of the second stage


def test_both_orders_leave_one_group_alone_at_first() -> None:
    for stages, still in (("lora-first", "routers"), ("routers-first", "weights")):
        module = stepping(make_module(stages=stages), 0, 20)
        made = module.configure_optimizers()
        rates = {group["name"]: group["lr"] for group in made["optimizer"].param_groups}
        assert {name for name, rate in rates.items() if rate == 0} >= {still}
