"""Perturbed decisions: those that noise and random gates make by hand, however a sequence is cut, and nothing else."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from qtale_lightning.data import EncodedPrompt
from qtale_lightning.evaluation.scoring import score_thresholds
from qtale_lightning.models import RoutedForCausalLM, Routing
from qtale_lightning.routing.methods.random import uniform
from qtale_lightning.routing.perturbation import UNPERTURBED, Perturbation, perturb, perturbed
from qtale_lightning.routing.router import execute_probability
from tests.routing.conftest import Make

BOTH = Perturbation(noise=0.7, random_gates=0.3, random_ratio=0.6, draw=2)


@pytest.fixture
def model(make: Make) -> RoutedForCausalLM:
    """Five layers, of which the first has no router."""
    return make("qtale")


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(0))


def run(model: RoutedForCausalLM, ids: Tensor, **options: Any) -> tuple[Tensor, Routing]:
    """Logits, and what was decided."""
    routing = Routing(**options)
    with torch.no_grad():
        return model(ids, routing=routing, use_cache=False).logits, routing


def test_nothing_asked_changes_nothing(model: RoutedForCausalLM) -> None:
    ids = tokens(2, 12)
    before, _ = run(model, ids)
    perturb(model, BOTH)
    assert not torch.equal(run(model, ids)[0], before)
    perturb(model, UNPERTURBED)
    assert perturbed(model) == {}
    assert torch.equal(run(model, ids)[0], before)


def test_the_first_layers_decisions_are_those_by_hand(model: RoutedForCausalLM) -> None:
    """Later ones see other states; there, too, the router's own logits decide what isn't replaced."""
    ids = tokens(8, 20)
    places = torch.arange(20).expand(8, 20)
    _, plain = run(model, ids)
    perturb(model, BOTH)
    _, routing = run(model, ids, threshold=0.4)
    noise, replaced, by = (uniform(ids, places, 1, 3 * 2 + draw) for draw in range(3))
    gap = plain.logits[1][..., 1] - plain.logits[1][..., 0] + 0.7 * torch.log(noise / (1 - noise))
    rate = (0.6 * 5 - 1) / 4
    expected = torch.where(replaced < 0.3, by < rate, gap.sigmoid() >= 0.4)
    assert torch.equal(routing.gates[1][:, 2:], expected[:, 2:])
    assert routing.gates[1][:, :2].all(), "reserved tokens execute"
    assert 0.1 < float((expected != plain.gates[1])[:, 2:].float().mean()) < 0.6, "nothing is tested"


def test_noise_of_1_executes_with_the_routers_probability(model: RoutedForCausalLM) -> None:
    """As Gumbel noise does in training: of tokens that the router is alike sure of, as many as it says."""
    perturb(model, Perturbation(noise=1))
    ids = tokens(80, 60)
    gates = run(model, ids)[1].gates[1][:, 2:].float()
    perturb(model, UNPERTURBED)
    probability = execute_probability(run(model, ids)[1].logits[1])[:, 2:]
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        alike = (low <= probability) & (probability < low + 0.2)
        assert (count := int(alike.sum())) > 100
        share = float(gates[alike].mean())
        assert share == pytest.approx(
            float(probability[alike].mean()), abs=1.5 / count**0.5
        )  # 3 standard errors


def test_random_gates_alone_execute_their_ratio_independently(model: RoutedForCausalLM) -> None:
    perturb(model, Perturbation(random_gates=1.0, random_ratio=0.6))
    free = run(model, tokens(50, 60))[1].stacked_gates()[..., 2:]
    assert float(free.mean()) == pytest.approx(0.5, abs=0.015)  # 3 standard errors of 11,600 draws
    assert float(free.sum(0).var()) == pytest.approx(4 * 0.25, abs=0.08)  # the binomial's


def test_threshold_0_is_the_base_model(model: RoutedForCausalLM) -> None:
    ids = tokens(2, 12)
    before, _ = run(model, ids, threshold=0.0)
    perturb(model, BOTH)
    assert torch.equal(run(model, ids, threshold=0.0)[0], before)


def test_masked_execution_is_packed_execution(model: RoutedForCausalLM) -> None:
    perturb(model, BOTH)
    (masked, one), (packed, other) = (
        run(model, tokens(3, 20), execution=execution) for execution in ("masked", "packed")
    )
    assert torch.equal(one.stacked_gates(), other.stacked_gates())
    torch.testing.assert_close(masked, packed, atol=1e-4, rtol=1e-4)  # float32, logits of size 10


def test_padding_and_cuts_change_no_decision(model: RoutedForCausalLM) -> None:
    """A prompt with padding before it, then its tokens one by one; none of them by the C++ that knows routers alone."""
    perturb(model, BOTH)
    ids = tokens(2, 16)
    expected, whole = run(model, ids)
    padded = torch.nn.functional.pad(ids, (3, 0))
    mask = (torch.arange(19) >= 3).long().expand(2, -1)
    with torch.no_grad():
        output = model(padded[:, :9], attention_mask=mask[:, :9], routing=Routing(), use_cache=True)
        for at in range(9, 19):
            routing = Routing()
            output = model(
                padded[:, at : at + 1],
                attention_mask=mask[:, : at + 1],
                past_key_values=output.past_key_values,
                routing=routing,
            )
            assert torch.equal(routing.stacked_gates()[..., 0], whole.stacked_gates()[..., at - 3])
            torch.testing.assert_close(output.logits[:, 0], expected[:, at - 3], atol=1e-4, rtol=1e-4)


def test_thresholds_scored_together_are_perturbed_alike(model: RoutedForCausalLM) -> None:
    """Where a pass resumes behind layers that it shares with another, tokens are known as ever."""
    perturb(model, BOTH)
    questions = [
        EncodedPrompt("facts", 0, (tuple(row[:9]),) * 2, (tuple(row[9:12]), tuple(row[12:])), (4, 4))
        for row in tokens(6, 14).tolist()
    ]
    together = score_thresholds(model, questions, [0.5, 0.3])
    for threshold, found in zip((0.5, 0.3), together, strict=True):
        (alone,) = score_thresholds(model, questions, [threshold])
        assert found.execution == alone.execution
        for ours, theirs in zip(found.loglikelihoods, alone.loglikelihoods, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)  # sums of a few float32 terms of size 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"noise": -0.1}, "--noise -0.1: must be >= 0"),
        ({"noise": float("nan")}, "--noise nan: must be"),
        ({"random_gates": 1.1, "random_ratio": 0.7}, "--random_gates 1.1: must be"),
        ({"random_gates": 0.1}, "--random_gates needs --random_ratio"),
        ({"random_gates": 0.1, "random_ratio": 0.0}, "--random_ratio 0.0: must be > 0"),
        ({"random_ratio": 0.7}, "give their share"),
        ({"noise": 1.0, "draw": -1}, "--draw -1: must be >= 0"),
    ],
)
def test_what_cant_be_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Perturbation(**options)


def test_models_that_cant_be_perturbed_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="random aren't those of routers: leave --noise out"):
        perturb(make("random"), Perturbation(noise=1))
    few = Perturbation(random_gates=0.1, random_ratio=0.1)
    with pytest.raises(ValueError, match=r"--random_ratio 0.1 can't be reached.*at least 0.200"):
        perturb(make("qtale"), few)
    model = make("qtale")
    perturb(model, Perturbation(noise=1))
    with pytest.raises(ValueError, match="give the model input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 32))


def test_a_record_and_a_command_line_say_it_all() -> None:
    assert BOTH.record == {"noise": 0.7, "random_gates": 0.3, "random_ratio": 0.6, "draw": 2}
    assert " ".join(BOTH.arguments) == "--noise 0.7 --random_gates 0.3 --random_ratio 0.6 --draw 2"
    assert BOTH.words == "noise 0.7, 30 % random gates, draw 2"
    assert dataclasses.replace(UNPERTURBED, draw=3).record == {}, "a draw of nothing"
