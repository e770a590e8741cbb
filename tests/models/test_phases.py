"""Precision that falls while a text is written, by a schedule of the generation configuration."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from qtale_lightning.bits_schedule import Schedule
from qtale_lightning.models import RoutedForCausalLM, Routing
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.linear import QuantizedLinear
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.recipe import Codes, Recipe
from qtale_lightning.quantization.rtn import Scheme, quantize
from tests.llama import llama_config, mix_decisions

GROUP, NEW = 32, 8
PROMPT = torch.tensor([[5, 9, 20, 33, 41], [7, 3, 60, 12, 50]])


def routed() -> RoutedForCausalLM:
    torch.manual_seed(0)
    config = llama_config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        router_width=16,
        start_layer=1,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight") or "embed" in name:
                parameter.normal_(std=0.2)
    return mix_decisions(model)


def nested() -> RoutedForCausalLM:
    """Of 4 bits, whose highest 3 and 2 are read, too: far from each other, as nothing was learned."""
    model, codes = routed(), {}
    for name in linear_shapes(model):
        weight = quantize(model.get_submodule(name).weight.detach(), Scheme(4, GROUP))
        codes[name] = Codes(
            weight.codes.flatten(1).byte(), weight.scales[..., 0], weight.zeros[..., 0].byte()
        )
    quantize_model(model, Recipe("nested", dict.fromkeys(codes, 4), GROUP, codes=codes, held=[2, 3, 4]))
    return model


def linears(model: Any) -> list[QuantizedLinear]:
    return [part for part in model.modules() if isinstance(part, QuantizedLinear)]


def written(model: RoutedForCausalLM, schedule: Any = None, **more: Any) -> Tensor:
    config = GenerationConfig(do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0)
    if schedule is not None:
        config.bits_schedule = schedule  # type: ignore[attr-defined]
    mask = torch.ones_like(PROMPT)
    found: Tensor = model.generate(PROMPT, attention_mask=mask, generation_config=config, **more)
    return found[:, PROMPT.shape[1] :]


@torch.no_grad()
def step_by_step(model: RoutedForCausalLM, bits: list[int], thetas: list[float]) -> Tensor:
    """The same by hand: one call a token, each at its own precision and θ."""
    cache, ids, found = None, PROMPT, []
    for width, theta in zip(bits, thetas, strict=True):
        for part in linears(model):
            part.read_at(width)
        output = model(ids, past_key_values=cache, use_cache=True, routing=Routing(threshold=theta))
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        found.append(ids)
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    ("schedule", "bits", "thetas"),
    [
        ([[0, 4]], [4] * 8, [0.5] * 8),
        ([[0, 4], [3, 2]], [4] * 3 + [2] * 5, [0.5] * 8),
        ([[0, 4], [1, 3], [5, 2]], [4] + [3] * 4 + [2] * 3, [0.5] * 8),
        ([[0, 4, 0.0], [4, 4, 0.9]], [4] * 8, [0.0] * 4 + [0.9] * 4),
    ],
)
def test_each_token_by_its_phase(schedule: Any, bits: list[int], thetas: list[float]) -> None:
    """The prompt and its first token by the first phase; behind n written ones by the phase that begins at n."""
    model = nested()
    expected = step_by_step(model, bits, thetas)
    assert torch.equal(written(model, schedule, routing=Routing(threshold=0.5)), expected)


def test_the_model_is_left_as_it_was() -> None:
    model, routing = nested(), Routing(threshold=0.4)
    before = written(model)
    assert not torch.equal(written(model, [[0, 4], [1, 2]], routing=routing), before)  # seen to change
    assert {part.kernel.bits for part in linears(model)} == {4}  # type: ignore[union-attr]
    assert routing.threshold == 0.4
    assert torch.equal(written(model), before)


def test_a_schedule_is_saved_with_the_model(tmp_path: Path) -> None:
    model = nested()
    model.generation_config.bits_schedule = [[0, 4], [2, 2]]  # type: ignore[attr-defined]
    expected = step_by_step(nested(), [4] * 2 + [2] * 6, [0.5] * 8)
    model.save_pretrained(tmp_path)
    loaded = RoutedForCausalLM.from_pretrained(tmp_path).eval()
    found = loaded.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    assert torch.equal(found[:, PROMPT.shape[1] :], expected)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("0:4,", "is no schedule"),
        ("0:four", "is no schedule"),
        ([], "is no schedule"),
        ([[0]], "is no schedule"),
        ([[0, 4.5]], "is no schedule"),
        ([[0, 4, 1.5]], "is no schedule"),
        ([[2, 4]], "begin with 0:4"),
        ([[0, 4], [0, 3]], "must rise"),
        ([[0, 3], [4, 4]], "rises from 3 to 4 bits"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Schedule.read(schedule)


def test_both_forms_are_the_same() -> None:
    schedule = Schedule.read("0:4,16:3:0.25")
    assert schedule.rows() == [[0, 4], [16, 3, 0.25]]
    assert str(Schedule.read(schedule.rows())) == "0:4,16:3:0.25"


def test_a_precision_that_isnt_held_is_refused(tmp_path: Path) -> None:
    model = nested()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no model at 8 bits in memory, but at \[2, 3, 4\]"):
        written(model, [[0, 8]])
    with pytest.raises(ValueError, match="Load a folder with nested codes"):
        written(RoutedForCausalLM.from_pretrained(tmp_path, bits=4).eval(), [[0, 4], [2, 3]])
    with pytest.raises(ValueError, match="isn't quantized"):
        written(routed(), [[0, 4]])
