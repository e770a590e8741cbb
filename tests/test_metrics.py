"""What training and validation record of routers, against decisions made by hand."""

import pytest
import torch
from torch import Tensor

from qtale_lightning.metrics import Histogram, RoutingDiagnostics, path_logs
from qtale_lightning.models.routing import Routing
from qtale_lightning.routing.statistics import router_statistics


def decided(probability: Tensor, executed: Tensor, free: Tensor) -> Routing:
    """A filled-in routing of layers 2, 3, …: p(execute) and decisions ``(R, B, T)``."""
    logits = torch.stack([torch.zeros_like(probability), torch.logit(probability)], dim=-1)
    layers = range(2, 2 + len(probability))
    routing = Routing(tokens=torch.ones_like(free), free=free)
    routing.logits = dict(zip(layers, logits, strict=True))
    routing.gates = dict(zip(layers, executed.float(), strict=True))
    return routing


@pytest.fixture
def routing() -> Routing:
    """Two layers, two sequences of three tokens, the first reserved; of layer 3 one decision of four is flipped."""
    probability = torch.tensor([[[0.9, 0.9, 0.8], [0.9, 0.7, 0.6]], [[0.9, 0.1, 0.2], [0.1, 0.3, 0.4]]])
    executed = probability >= 0.5
    executed[1, 1, 2] = True
    executed[0, 0, 0] = False  # reserved: not counted
    return decided(probability, executed, torch.tensor([[False, True, True], [False, True, True]]))


def test_flips_are_counted_by_layer_among_free_tokens(routing: Routing) -> None:
    found = router_statistics(routing, "flip_ratio")
    assert float(found["flip_ratio_layer_02"]) == 0
    assert float(found["flip_ratio_layer_03"]) == pytest.approx(0.25)
    assert float(found["flip_ratio"]) == pytest.approx(0.125)
    p = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.1, 0.2, 0.3, 0.4])
    assert float(found["logit_gap"]) == pytest.approx(float(torch.logit(p).abs().mean()), rel=1e-5)


def test_a_histogram_puts_what_is_beyond_into_its_outer_bins() -> None:
    histogram = Histogram(-1.0, 1.0, 4)
    histogram.update(torch.tensor([[-9.0, -1.0, -0.5], [0.0, 0.49, 1.0]]))
    histogram.update(torch.tensor([7.0]))
    assert histogram.summary() == {"edges": [-1.0, -0.5, 0.0, 0.5, 1.0], "counts": [2, 1, 2, 2]}


def test_diagnostics_record_free_tokens_as_inference_and_noise_decide(routing: Routing) -> None:
    diagnostics = RoutingDiagnostics()
    for seed in range(500):
        diagnostics.update(routing, seed)
    found = diagnostics.compute()
    # Paths (1, 0), three times, and (1, 1): what the routing's gates say.
    assert found["paths"]["tokens"] == 4 * 500
    assert found["paths"]["distinct"] == 2
    assert found["noisy_paths"]["distinct"] == 4
    assert sum(found["probability"]["counts"]) == sum(found["logit_gap"]["counts"]) == 8 * 500
    assert path_logs(found)["noisy_paths/distinct"] == 4
    diagnostics.reset()
    assert diagnostics.compute() == {}


def test_noise_executes_with_the_routers_probability(routing: Routing) -> None:
    """Two layers of equal p: the entropy of the path of independent decisions is that of the two summed."""
    probability = torch.full((2, 40, 50), 0.3)
    routing = decided(probability, probability >= 0.5, torch.ones(40, 50, dtype=torch.bool))
    diagnostics = RoutingDiagnostics()
    diagnostics.update(routing, 0)
    wanted = 2 * float(torch.distributions.Bernoulli(0.3).entropy())
    # 2,000 tokens: the standard error of this entropy is about 0.01.
    assert diagnostics.compute()["noisy_paths"]["entropy"] == pytest.approx(wanted, abs=0.05)
    assert diagnostics.compute()["paths"]["distinct"] == 1


def test_a_seed_gives_the_same_noise(routing: Routing) -> None:
    found = []
    for seed in (0, 0, 1):
        diagnostics = RoutingDiagnostics()
        diagnostics.update(routing, seed)
        found.append(torch.cat(diagnostics.noisy_paths.codes).tolist())
    assert found[0] == found[1] != found[2]


def test_a_model_without_routers_records_nothing() -> None:
    diagnostics = RoutingDiagnostics()
    diagnostics.update(Routing(tokens=torch.ones(1, 3).bool(), free=torch.ones(1, 3).bool()), 0)
    assert diagnostics.compute() == {}
    assert path_logs({}) == {}
