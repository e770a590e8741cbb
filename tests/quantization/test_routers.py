"""Routers that are fitted to a quantized model's stream."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qtale_lightning.models import Routing
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import Recipe, round_to_nearest
from qtale_lightning.quantization.routers import refit_routers
from tests.quantization.conftest import GROUP, MakeModel, MakeRouted


def rounded(model: Any, bits: int) -> Recipe:
    return round_to_nearest(uniform(linear_shapes(model), bits, {}), GROUP)


def decisions(model: Any, rows: Tensor) -> Tensor:
    """About free tokens, of all routed layers."""
    routing = Routing()
    with torch.no_grad():
        model(rows, routing=routing)
    return (routing.stacked_gates() != 0)[:, routing.free]


def test_decisions_come_back(make_routed: MakeRouted) -> None:
    """What it says it turns is what the packed model turns, and on other rows it helps as well."""
    generator = torch.Generator().manual_seed(1)
    rows, others = (torch.randint(96, (64, 24), generator=generator) for _ in range(2))
    recipe = rounded(make_routed(), 2)
    refit = refit_routers(make_routed(), recipe, [{"input_ids": rows}])
    kept, fitted = make_routed(), make_routed()
    quantize_model(kept, recipe)
    quantize_model(fitted, recipe, routers=refit.weights)
    for tokens in (rows, others):
        exact = decisions(make_routed(), tokens)
        turned = [(decisions(model, tokens) != exact).float().mean().item() for model in (kept, fitted)]
        assert turned[1] < 0.92 * turned[0]
        if tokens is rows:
            assert turned == pytest.approx(refit.turned, abs=0.01)


def test_a_model_that_rounding_leaves_alone_keeps_its_routers(make_routed: MakeRouted, rows: Tensor) -> None:
    model = make_routed()
    refit = refit_routers(model, rounded(model, 8), [{"input_ids": rows}])
    for name, parameter in refit.weights.items():
        torch.testing.assert_close(parameter, model.get_parameter(name).detach(), rtol=0.1, atol=0.1)
    assert refit.turned[1] <= refit.turned[0] < 0.1


def test_what_both_logits_share_stays(make_routed: MakeRouted, rows: Tensor) -> None:
    model = make_routed()
    refit = refit_routers(model, rounded(model, 2), [{"input_ids": rows}])
    assert refit.weights.keys() == {n for n, _ in model.named_parameters() if ".router.out." in n}
    for name, parameter in refit.weights.items():
        torch.testing.assert_close(parameter.sum(0), model.get_parameter(name).detach().sum(0))


def test_a_model_without_routers_is_refused(make_model: MakeModel, rows: Tensor) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"no routers to fit: leave --quantize\.refit_routers out"):
        refit_routers(model, rounded(model, 4), [{"input_ids": rows}])
