"""The registry of methods, and what holds for every method that decides token by token."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtale_lightning.evaluation.cost import base_layers
from qtale_lightning.models import RoutedCache, RoutedForCausalLM, Routing
from qtale_lightning.routing import METHODS, method_of
from tests.llama import llama_config
from tests.routing.conftest import ARCHITECTURE, Make
from tests.tolerance import close, depth

DECIDING = [name for name, method in METHODS.items() if method.decides]
each = pytest.mark.parametrize("method", DECIDING)


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: RoutedForCausalLM, tokens: Tensor, **given: Any) -> Tensor:
    return model(tokens, **given).logits


def test_a_method_has_its_own_name_and_title() -> None:
    assert {"full", "dllm", "qtale", "static", "random", "mod"} <= METHODS.keys()
    assert all(method.name == name for name, method in METHODS.items())
    assert len({method.title for method in METHODS.values()}) == len(METHODS)
    assert all(method.decides for method in METHODS.values() if method.routers or method.theta)


def test_an_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'magic'.*qtale"):
        method_of("magic")
    with pytest.raises(Exception, match="unknown method 'magic'"):
        llama_config(**ARCHITECTURE, method="magic")


def test_a_folder_that_doesnt_name_its_method_has_routers_and_a_threshold() -> None:
    config = llama_config(**ARCHITECTURE, start_layer=2)
    assert config.has_theta
    assert not llama_config(**ARCHITECTURE, start_layer=5).has_theta
    assert base_layers(config) == 5


@pytest.mark.parametrize("method", METHODS)
def test_a_threshold_without_effect_is_refused_where_it_is_set(method: str) -> None:
    decides = METHODS[method].decides
    config = llama_config(**ARCHITECTURE, method=method, start_layer=2 if decides else 5)
    config.threshold = config.threshold  # says nothing new
    if METHODS[method].theta:
        config.threshold = 0.25
        assert config.threshold == 0.25
    else:
        with pytest.raises(ValueError, match=f"no θ, by its method {method}"):
            config.threshold = 0.25


@each
def test_packed_execution_is_masked_execution(make: Make, method: str) -> None:
    model, tokens = make(method), ids(3, 14)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    packed, masked = Routing(execution="packed"), Routing(execution="masked")
    given = {"attention_mask": mask, "use_cache": False}
    real = mask.bool()
    found = logits(model, tokens, routing=packed, **given)[real]
    close(found, logits(model, tokens, routing=masked, **given)[real], depth(model.config))
    for layer in packed.gates:
        assert torch.equal(packed.gates[layer], masked.gates[layer])
    executed = packed.stacked_gates()[:, packed.free]
    assert 0 < executed.mean() < 1, "decisions aren't mixed: nothing is tested"


@each
def test_prefill_and_decoding_are_one_pass(make: Make, method: str) -> None:
    """Padded on the left, cut anywhere: decisions go by a token and those before it alone."""
    model, tokens = make(method), ids(2, 12)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    whole = logits(model, tokens, attention_mask=mask, use_cache=False)
    cache, parts = RoutedCache(), []
    for start, end in ((0, 7), (7, 8), (8, 11), (11, 12)):
        given = {"attention_mask": mask[:, :end], "past_key_values": cache, "use_cache": True}
        parts.append(logits(model, tokens[:, start:end], **given))
    real = mask.bool()
    close(torch.cat(parts, 1)[real], whole[real], depth(model.config))


@each
def test_generation_is_the_same_with_and_without_a_cache(make: Make, method: str) -> None:
    model, tokens = make(method), ids(2, 6)
    both: list[Tensor] = [
        model.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)  # type: ignore[misc]
        for cache in (True, False)
    ]
    assert torch.equal(*both)


@each
def test_an_exported_model_decides_as_before(make: Make, method: str, tmp_path: Any) -> None:
    model, tokens = make(method, routing_seed=3), ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert (loaded.config.method, loaded.config.rate, loaded.config.routing_seed) == (method, 0.6, 3)


@each
def test_training_decisions_are_zero_or_one_and_reach_the_routers(make: Make, method: str) -> None:
    model = make(method).train()
    routing = Routing()
    output = model(ids(2, 16), routing=routing).logits.square().mean()
    gates = routing.stacked_gates()
    assert set(gates.unique().tolist()) == {0.0, 1.0}
    routers = {name: p for name, p in model.named_parameters() if ".router." in name}
    assert bool(routers) == METHODS[method].routers
    output.backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in routers.values())
