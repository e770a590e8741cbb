"""Every declared family against Hugging Face's own model of it, and its scaled groups against AutoAWQ's.

Small random models in float32; what may differ is the order of sums (tests/tolerance.py). Where a family has a sliding
window, it is shorter than the sequences.
"""

import copy
import importlib
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qtale_lightning.architectures import ARCHITECTURES, architecture_of
from qtale_lightning.models import RoutedCache, RoutedForCausalLM, Routing, cache, route, routed_config
from qtale_lightning.models.families import classes_of
from qtale_lightning.models.packing import Packing, rows_of
from qtale_lightning.quantization import awq
from qtale_lightning.quantization.calibration import padded_batches
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.engines import ENGINES
from qtale_lightning.quantization.final_norm import refit_final_norm
from qtale_lightning.quantization.mappings import decoder_layers, linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import apply_scales
from qtale_lightning.routing import METHODS
from tests.llama import mix_decisions
from tests.tolerance import MARGIN, close

LENGTH, WINDOW, LAYERS, GROUP = 20, 6, 4, 16
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # logits, and so decisions, that differ between tokens
    "pad_token_id": 0,
    "eos_token_id": None,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32, "attention_bias": True},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": WINDOW, "sliding_window_pattern": 2},
}
# AutoAWQ has no Gemma 3; its layer has Gemma 2's modules.
AUTOAWQ = {
    "llama": ("llama", "LlamaAWQForCausalLM"),
    "mistral": ("mistral", "MistralAWQForCausalLM"),
    "qwen2": ("qwen2", "Qwen2AWQForCausalLM"),
    "qwen3": ("qwen3", "Qwen3AWQForCausalLM"),
    "gemma3_text": ("gemma2", "Gemma2AWQForCausalLM"),
}
TERMS = LAYERS * (2 * 64 + 32 + 128 + 96) + 64  # as `tolerance.depth` counts them

Family = str
Make = Callable[..., RoutedForCausalLM]


@pytest.fixture(params=ARCHITECTURES)
def family(request: pytest.FixtureRequest) -> Family:
    """By Hugging Face's name."""
    return request.param


@pytest.fixture
def dense(family: Family) -> PreTrainedModel:
    """Hugging Face's own."""
    torch.manual_seed(0)
    plain = classes_of(family).plain
    model = plain(plain.config_class(**SIZES | OWN[family])).eval()
    for name, weight in model.named_parameters():  # biases that matter, and norms whose channels are uneven
        if "norm" in name:
            weight.data = torch.randn(len(weight)).mul(0.7).exp() - ARCHITECTURES[family].norm_offset
        elif weight.dim() == 1:
            nn.init.normal_(weight, 0.0, 0.2)
    return model


@pytest.fixture
def make(dense: PreTrainedModel) -> Make:
    """The same weights with random routers whose decisions at θ = 0.5 are mixed."""

    def made(**options: Any) -> RoutedForCausalLM:
        config = routed_config(dense.config, router_width=16, start_layer=1, **options)
        torch.manual_seed(1)
        return mix_decisions(route(copy.deepcopy(dense), config))

    return made


@pytest.fixture(params=["right", "left"])
def batch(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """Two sequences, one of them padded."""
    torch.manual_seed(2)
    ids = torch.randint(3, 97, (2, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, (slice(15, None) if request.param == "right" else slice(5))] = 0
    return {"input_ids": ids, "attention_mask": mask}


def real(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return logits[batch["attention_mask"].bool()]


def test_every_family_is_tried() -> None:
    assert ARCHITECTURES.keys() == OWN.keys() == AUTOAWQ.keys()


@torch.no_grad()
def test_full_execution_is_hugging_faces(
    dense: PreTrainedModel, make: Make, batch: dict[str, Tensor]
) -> None:
    expected, model = dense(**batch).logits, make()
    for execution in ("masked", "packed"):
        routing = Routing(threshold=0.0, execution=execution)  # type: ignore[arg-type]
        close(real(model(**batch, routing=routing).logits, batch), real(expected, batch), TERMS)


@torch.no_grad()
def test_masked_and_packed_execution_agree(make: Make, batch: dict[str, Tensor]) -> None:
    model = make()
    masked, packed = Routing(execution="masked"), Routing(execution="packed")
    expected, found = model(**batch, routing=masked).logits, model(**batch, routing=packed).logits
    decided = masked.stacked_gates()[:, batch["attention_mask"].bool()]
    assert 0.2 < float(decided.mean()) < 0.9
    close(real(found, batch), real(expected, batch), TERMS)


@torch.no_grad()
def test_a_familys_own_forward_and_the_fused_one_agree(
    family: Family, make: Make, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The routed layer's definition is Hugging Face's forward; what is faster is held to it."""
    fused = make()
    monkeypatch.setitem(ARCHITECTURES, family, replace(ARCHITECTURES[family], fused=False))
    own = make()
    assert "FusedLayer" not in str(type(own.model.layers[0]).__mro__)
    expected, found = (model(**batch, routing=Routing()).logits for model in (own, fused))
    close(real(found, batch), real(expected, batch), TERMS)
    last = fused(**batch, logits_to_keep=1).logits
    close(last, found[:, -1:], TERMS)


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_generated_text(dense: PreTrainedModel, make: Make, batch: dict[str, Tensor], beams: int) -> None:
    """At θ = 0 it is Hugging Face's; at θ = 0.5, with a cache it is what it is without, beyond the window, too."""
    batch = (
        {name: tensor.flip(1) for name, tensor in batch.items()}
        if batch["attention_mask"][0, -1] == 0
        else batch
    )
    options: Any = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams}
    expected = dense.generate(**batch, **options)  # type: ignore[operator]
    assert make(threshold=0.0).generate(**batch, **options).equal(expected)
    routed = make()
    cached, whole = (routed.generate(**batch, **options, use_cache=use) for use in (True, False))
    assert cached.equal(whole)


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_a_window_that_begins_to_bind_while_decoding(
    make: Make, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is computed for it before, and then it is exact: of sequences of different lengths, beams or not."""
    worked_out: list[Tensor] = []

    def spy(places: Tensor, packing: Packing) -> Tensor:
        worked_out.append(places)
        return rows_of(places, packing)

    monkeypatch.setattr(cache, "rows_of", spy)
    short = {
        "input_ids": torch.arange(3, 9).view(2, 3),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
    }
    options: Any = {"do_sample": False, "num_beams": beams}
    routed = make()
    cached, whole = (
        routed.generate(**short, **options, max_new_tokens=2 * WINDOW, use_cache=use) for use in (True, False)
    )
    assert cached.equal(whole)
    worked_out.clear()
    routed.generate(**short, max_new_tokens=WINDOW - 3)
    assert not worked_out


@torch.no_grad()
def test_keys_and_values_that_are_kept(make: Make, batch: dict[str, Tensor]) -> None:
    """Masked, packed and cached execution agree, beyond the window, too."""
    model = make(keep_kv=True)
    expected = model(**batch, routing=Routing(execution="masked")).logits
    seen = RoutedCache()
    for start, end in ((0, 11), (11, 12), (12, LENGTH)):
        ids, mask = batch["input_ids"][:, start:end], batch["attention_mask"][:, :end]
        found = model(ids, attention_mask=mask, past_key_values=seen).logits
        kept = batch["attention_mask"][:, start:end].bool()
        close(found[kept], expected[:, start:end][kept], TERMS)
    assert {layer.lengths for layer in seen.layers} == {tuple(batch["attention_mask"].sum(1).tolist())}


@torch.no_grad()
def test_an_exported_model_is_loaded_again(make: Make, batch: dict[str, Tensor], tmp_path: Path) -> None:
    model = make(threshold=0.3)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(RoutedForCausalLM.from_pretrained(tmp_path)) is type(model)
    assert again(**batch).logits.equal(model(**batch).logits)


def test_gradients_reach_routers_and_weights(make: Make, batch: dict[str, Tensor]) -> None:
    model = make().train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


def test_scaled_groups_are_autoawqs(family: Family, dense: PreTrainedModel) -> None:
    module, name = AUTOAWQ[family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(importlib.import_module(f"awq.models.{module}"), name)
    for layer in decoder_layers(dense):
        groups = theirs.get_layers_for_scaling(layer.module, defaultdict(lambda: None), {})
        expected = [
            (group["prev_op"], group["layers"], group.get("module2inspect", group["layers"][0]))
            for group in groups
        ]
        found = [
            (
                layer.module.get_submodule(mapping.previous),
                [layer.linears[linear] for linear in mapping.linears],
                layer.module.get_submodule(mapping.inspected),
            )
            for mapping in layer.scaled_mappings()
        ]
        assert [(a, [*b], c) for a, b, c in found] == expected


@torch.no_grad()
def test_a_search_changes_no_logit_and_helps_to_round(make: Make) -> None:
    """Scales folded into norms, whatever they store, and a quantized model that is nearer for its search."""
    torch.manual_seed(3)
    model, rows = make(threshold=0.0), torch.randint(3, 97, (8, LENGTH))
    batches = padded_batches(rows.tolist())
    [recipe] = awq.search(model, batches, [uniform(linear_shapes(model), 4, {})], GROUP)
    assert recipe.family == architecture_of(model.config).model_type
    expected = model(rows).logits
    scaled = copy.deepcopy(model)
    apply_scales(scaled, recipe)
    torch.testing.assert_close(
        scaled(rows).logits, expected, rtol=0, atol=MARGIN * 1e-5 * float(expected.abs().max())
    )
    assert not scaled.model.layers[0].self_attn.q_proj.weight.equal(
        model.model.layers[0].self_attn.q_proj.weight
    )
    norm = refit_final_norm(model, recipe, batches)

    def error(final_norm: Tensor | None, plain: bool = False) -> float:
        packed = copy.deepcopy(model)
        quantize_model(packed, replace(recipe, scales={}, clips={}) if plain else recipe, final_norm)
        return float((packed(rows).logits - expected).square().mean())

    # The fit of the final norm is regularised: on a few tokens it may gain nothing, and never loses much.
    assert error(norm) < 1.05 * error(None) < 1.05 * error(None, plain=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # AutoAWQ's farewell
@pytest.mark.parametrize("engine", [name for name, one in ENGINES.items() if one.calibrates])
@torch.no_grad()
def test_every_engine_beats_rounding(make: Make, engine: str) -> None:
    """On what its own quantized layers give, too: a family's layers run with what a search found for them."""
    torch.manual_seed(3)
    model, rows = make(threshold=0.0), torch.randint(3, 97, (8, LENGTH))
    batches, bits = padded_batches(rows.tolist()), uniform(linear_shapes(model), 3, {})
    expected = model(rows).logits

    def error(name: str, **more: Any) -> float:
        packed = copy.deepcopy(model)
        quantize_model(packed, ENGINES[name](model, batches, [bits], GROUP, **more)[0])
        return float((packed(rows).logits - expected).square().mean())

    plain, quick = error("rtn"), {"steps": 20} if "steps" in ENGINES[engine].options else {}
    assert error(engine, **quick) < plain
    assert error(engine, sequential=True, **quick) < plain


def test_parameters_and_shapes_are_counted_right(dense: PreTrainedModel) -> None:
    from qtale_lightning.evaluation import cost

    assert cost.parameter_counts(dense.config).total == sum(p.numel() for p in dense.parameters())
    own = architecture_of(dense.config)
    for layer in decoder_layers(dense):
        shapes = {name: tuple(linear.weight.shape) for name, linear in layer.linears.items()}
        assert shapes == own.shapes(dense.config)


def test_a_model_without_some_layers_is_the_base_that_leaves_them_out(dense: PreTrainedModel) -> None:
    """The kinds of the layers that are left (their windows, their rotations) stay theirs."""
    ids, dropped = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(0)), [1]
    smaller = copy.deepcopy(dense)
    static, base = METHODS["static"], smaller.config
    fields = static.fields(LAYERS, 0, 0.75, 0) | {"dropped_layers": dropped}
    static.change(smaller, fields)
    routed = route(smaller, routed_config(base, **fields)).eval()
    handle = dense.model.layers[1].register_forward_hook(lambda layer, args, output: args[0])
    with torch.no_grad():
        expected = dense(ids, use_cache=False).logits
        handle.remove()
        assert not torch.allclose(expected, dense(ids, use_cache=False).logits)
        close(routed(ids, use_cache=False).logits, expected, TERMS)
