"""The final norm's fit against its objective, written out, and against what it is for: logits on other tokens."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qtale_lightning.models import RoutedForCausalLM
from qtale_lightning.quantization import final_norm
from qtale_lightning.quantization.calibration import padded_batches
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.final_norm import refit_final_norm
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import Recipe, round_to_nearest
from tests.quantization.conftest import GROUP, VOCABULARY, MakeRouted

TOKENS, WIDTH = 40, 12


def rounded(model: nn.Module, bits: int) -> Recipe:
    return round_to_nearest(uniform(linear_shapes(model), bits, {}), GROUP)


def sequences(seed: int, count: int = 60) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 20, (count,), generator=generator).tolist()
    return [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def made() -> tuple[Tensor, Tensor, Tensor]:
    """A head, and values of the norm in the quantized model and in the exact one, with its weight."""
    generator = torch.Generator().manual_seed(0)
    head, found, noise = (torch.randn(n, WIDTH, generator=generator) for n in (VOCABULARY, TOKENS, TOKENS))
    return head, found, found * 1.3 + 0.2 * noise


def value(terms: tuple[Tensor, Tensor], weight: Tensor) -> float:
    """γᵀAγ - 2bᵀγ."""
    quadratic, linear = terms
    return float(weight @ quadratic @ weight - 2 * linear @ weight)


def written_out(made: tuple[Tensor, Tensor, Tensor], weight: Tensor, kind: str) -> float:
    """The objective itself, token by token."""
    head, found, exact = made
    delta = (found * weight - exact) @ head.T
    if kind == "uniform":
        return float((delta.var(1, correction=0) + final_norm.SHIFT * delta.mean(1).square()).sum())
    probabilities = (exact @ head.T).softmax(-1)
    mean = (probabilities * delta).sum(1, keepdim=True)
    return float((probabilities * (delta - mean).square()).sum())


@pytest.mark.parametrize("kind", ["uniform", "sampled"])
def test_terms_are_those_of_the_objective(
    kind: str, made: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences between weights, since a constant is left out; sampled ones within the draws' noise."""
    monkeypatch.setattr(final_norm, "DRAWS", 20_000)
    terms = getattr(final_norm, f"_{kind}_terms")(*made)
    weights = [torch.ones(WIDTH), torch.linspace(0.5, 2.0, WIDTH)]
    found = value(terms, weights[1]) - value(terms, weights[0])
    expected = written_out(made, weights[1], kind) - written_out(made, weights[0], kind)
    assert found == pytest.approx(expected, rel=1e-4 if kind == "uniform" else 2e-2)


def test_nothing_rounded_changes_nothing(make_routed: MakeRouted, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_routed()
    monkeypatch.setattr(final_norm, "quantized_layer", lambda layer, recipe, fitted: layer.module)
    weight = refit_final_norm(model, rounded(model, 4), padded_batches(sequences(0)))
    torch.testing.assert_close(weight, model.model.norm.weight.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [3, 2])
@torch.no_grad()
def test_logits_of_other_tokens_come_closer(bits: int, make_routed: MakeRouted) -> None:
    """Also for a routed model, whose decisions follow what was rounded."""

    def logits(model: RoutedForCausalLM) -> Tensor:
        return torch.cat([model(torch.tensor([row])).logits[0] for row in sequences(1)])

    model = make_routed()
    recipe, exact = rounded(model, bits), logits(model)
    weight = refit_final_norm(model, recipe, padded_batches(sequences(0)))
    assert torch.equal(exact, logits(model))  # it isn't changed
    errors = []
    for fitted in (None, weight):
        packed = make_routed()
        quantize_model(packed, recipe, fitted)
        errors.append((logits(packed) - exact).square().mean().item())
    assert errors[1] < 0.95 * errors[0]


def test_it_is_kept_and_recorded(make_routed: MakeRouted, tmp_path: Path) -> None:
    model = make_routed()
    weight = torch.linspace(0.5, 1.5, 64)
    quantize_model(model, rounded(model, 4), weight)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.norm.weight, weight)
    assert loaded.config.quantization_config.refit_norm


def test_values_that_are_no_numbers_are_refused(make_routed: MakeRouted) -> None:
    model = make_routed()
    recipe = rounded(model, 4)
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float("nan")
    with pytest.raises(ValueError, match="hidden states have NaN or infinity"):
        refit_final_norm(model, recipe, padded_batches(sequences(0)))
