"""Thresholds by layer, and passes that resume where an earlier one can't differ."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from qtale_lightning.models import RoutedForCausalLM, Routing
from tests.llama import llama_config

ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "router_width": 8,
    "start_layer": 2,
    "initializer_range": 0.2,  # large enough for decisions that differ between tokens
}
BY_LAYER = [0.7, 0.5, 0.2]


@pytest.fixture(scope="module")
def model() -> RoutedForCausalLM:
    """Random weights, routers of mixed decisions."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(llama_config(**ARCHITECTURE))
    for layer in made.model.layers[2:]:
        nn.init.normal_(layer.router.out.weight, 0.0, 2.0)
        nn.init.zeros_(layer.router.out.bias)
    return made.eval()


def ids() -> Tensor:
    return torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(1))


def run(model: RoutedForCausalLM, routing: Routing) -> Tensor:
    with torch.no_grad():
        return model(ids(), routing=routing, use_cache=False).logits


@pytest.mark.parametrize("execution", ["masked", "packed"])
def test_every_layer_decides_by_its_own_threshold(model: RoutedForCausalLM, execution: Any) -> None:
    routing = Routing(threshold=BY_LAYER, execution=execution)
    run(model, routing)
    mixed = 0
    for layer, threshold in zip((2, 3, 4), BY_LAYER, strict=True):
        expected = (routing.logits[layer].softmax(-1)[..., 1] >= threshold) & routing.free
        expected |= routing.tokens & ~routing.free
        assert torch.equal(routing.gates[layer].bool(), expected)
        mixed += 0 < int((expected & routing.free).sum()) < int(routing.free.sum())
    assert mixed == 3, "decisions aren't mixed: nothing is tested"


def test_a_models_own_threshold_may_be_a_list(model: RoutedForCausalLM, tmp_path: Any) -> None:
    expected = run(model, Routing(threshold=BY_LAYER))
    assert not torch.equal(expected, run(model, Routing(threshold=0.5)))
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, threshold=BY_LAYER)
    loaded = RoutedForCausalLM.from_pretrained(tmp_path, config=config).eval()
    assert torch.equal(run(loaded, Routing()), expected)
    loaded.save_pretrained(tmp_path)
    assert RoutedForCausalLM.from_pretrained(tmp_path).config.threshold == BY_LAYER


@pytest.mark.parametrize(
    ("threshold", "words"),
    [
        (1.5, "threshold 1.5 is not a probability"),
        ([0.5, -0.1, 0.5], "threshold -0.1 is not a probability"),
        ([0.5, float("nan"), 0.5], "threshold nan is not a probability"),
        ([0.5, 0.5], "2 thresholds for 3 routed layers"),
        ([], "0 thresholds for 3 routed layers"),
    ],
)
def test_thresholds_that_cant_be(model: RoutedForCausalLM, threshold: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(model, Routing(threshold=threshold))
    with pytest.raises(ValueError, match=words):
        llama_config(**ARCHITECTURE).thresholds(threshold)
    with pytest.raises(Exception, match=words):
        llama_config(**ARCHITECTURE, threshold=threshold)


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_a_pass_resumes_where_an_earlier_one_was_the_same(model: RoutedForCausalLM, first: int) -> None:
    """Exactly as computed from the start, with the record of all layers."""
    before, after = [0.5, 0.5, 0.5], [0.5 if layer < first else 0.1 for layer in (2, 3, 4)]
    whole = Routing(threshold=after)
    expected = run(model, whole)
    resumed = Routing(threshold=before, keep=[first])
    assert not torch.equal(run(model, resumed), expected)
    resumed.threshold, resumed.resume = after, first
    assert torch.equal(run(model, resumed), expected)
    for record in ("logits", "gates"):
        found, wanted = getattr(resumed, record), getattr(whole, record)
        assert found.keys() == wanted.keys() == {2, 3, 4}
        assert all(torch.equal(found[layer], wanted[layer]) for layer in found)
    assert torch.equal(resumed.executed(5), whole.executed(5))


def test_what_isnt_there_cant_be_resumed(model: RoutedForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"resume at layer 2 .*kept: none"):
        run(model, Routing(threshold=0.5, resume=2))
    routing = Routing(threshold=0.5, keep=[2])
    run(model, routing)
    routing.resume, routing.execution = 2, "masked"
    with pytest.raises(ValueError, match="in packed execution only"):
        run(model, routing)


def test_nothing_is_kept_unasked(model: RoutedForCausalLM) -> None:
    routing = Routing(threshold=0.5)
    run(model, routing)
    assert routing.states == {}
