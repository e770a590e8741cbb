"""The engine `native` against AutoAWQ's own functions, and the engine `autoawq` against AutoAWQ's whole `quantize()`.

All in float32, on the same weights and inputs. At most 1023 tokens, so that AutoAWQ's subsample of the tokens in
its clip search takes all of them.
"""

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qtale_lightning.models import RoutedForCausalLM
from qtale_lightning.quantization import autoawq, awq
from qtale_lightning.quantization.awq import output_error
from qtale_lightning.quantization.calibration import Batch, Moments
from qtale_lightning.quantization.engines import ENGINES
from qtale_lightning.quantization.mappings import decoder_layers, linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import (
    CLIP_STEP,
    Recipe,
    apply_scales,
    clip_weight,
    quantized_weight,
    round_to_nearest,
    scale_vectors,
)
from qtale_lightning.quantization.rtn import Scheme, fake_quantize

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

GROUP = 32
MODEL_GROUP = 16
TOKENS = 512
VOCABULARY = 96
COMPARED = ("native", "autoawq")


def quantizer(bits: int, symmetric: bool = False, group_size: int = GROUP) -> Any:
    return autoawq.make_quantizer(Scheme(bits, group_size, symmetric))


def with_copied_state(module: nn.Module) -> nn.Module:
    """Makes AutoAWQ's backup of the weights a copy, as its `.cpu()` does for weights on another device.

    On CPU weights, AutoAWQ 0.2.9 backs up aliases: all candidates but the first are then tried on weights
    that the first one scaled, and the search leaves the weights so.
    """
    module.register_state_dict_post_hook(
        lambda module, state, prefix, metadata: state.update({key: w.clone() for key, w in state.items()})
    )
    return module


def loud_inputs(width: int, seed: int) -> Tensor:
    """Tokens with a few channels far above the rest, as LLaMA's activations have."""
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.ones(width)
    loudness[torch.randperm(width, generator=generator)[: width // 16]] = 20.0
    return torch.randn(TOKENS, width, generator=generator) * loudness


def moments_of(inputs: Tensor) -> Moments:
    moments = Moments.zeros(inputs.shape[-1])
    moments.add(inputs)
    return moments


def make_model(seed: int = 0, kv_heads: int = 4, layers: int = 2, width: int = 64) -> LlamaForCausalLM:
    """A small LLaMA with a few loud channels in the norms, as trained models have."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=VOCABULARY,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter[torch.randperm(width)[: width // 16]] = 12.0
            else:
                parameter.normal_(std=0.1)
    return model


def make_rows(count: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def make_batches() -> list[Batch]:
    """Two batches of different shapes, 192 tokens."""
    return [{"input_ids": make_rows(3, 32)}, {"input_ids": make_rows(4, 24)}]


def search(engine: str, model: nn.Module, bits: int = 4, **options: Any) -> Recipe:
    precision = uniform(linear_shapes(model), bits, {})
    batches = options.pop("batches", None) or make_batches()
    return ENGINES[engine](model, batches, [precision], MODEL_GROUP, **options)[0]


# Native, against AutoAWQ's functions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_bit_for_bit(bits: int, symmetric: bool) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(64, 128) * torch.logspace(-6, 1, 64)[:, None]
    weight[0], weight[1], weight[2] = 0.0, weight[1].abs() + 1, -weight[2].abs() - 1
    theirs = quantizer(bits, symmetric).pseudo_quantize_tensor(weight)[0]
    assert torch.equal(fake_quantize(weight, Scheme(bits, GROUP, symmetric)), theirs)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.no_grad()
def test_scales_of_a_single_linear(bits: int, seed: int) -> None:
    """o and down: the objectives are the same, so is the choice."""
    torch.manual_seed(seed)
    inputs = loud_inputs(128, seed)
    block = nn.ModuleDict({"up_proj": nn.Linear(64, 128), "down_proj": nn.Linear(128, 64, bias=False)})
    down = with_copied_state(block["down_proj"])
    weight, moments = down.weight.clone(), moments_of(inputs)
    candidates = awq.scale_candidates([weight], moments, GROUP)
    ours, _ = awq.best_of_all(candidates, awq.linear_objective(weight, moments.gram, Scheme(bits, GROUP)))
    before = down.weight.clone()
    _, _, theirs = quantizer(bits)._search_best_scale(block, block["up_proj"], [down], inputs[None])
    assert torch.equal(down.weight, before)
    # The same ratio of 20 (neighbours differ by 5% and more); the rest is the order of the mean's additions.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@torch.no_grad()
def test_objective_of_a_single_linear(bits: int) -> None:
    torch.manual_seed(0)
    inputs, weight = loud_inputs(128, 3), torch.randn(64, 128)
    delta = quantizer(bits).pseudo_quantize_tensor(weight)[0] - weight
    theirs = quantizer(bits)._compute_loss(inputs @ weight.T, inputs @ (weight + delta).T, inputs.device)
    ours = output_error(delta, moments_of(inputs).gram).item() / (TOKENS * 64)
    assert ours == pytest.approx(theirs, rel=1e-4)  # float32 sums of 3e4 squares, in another order


def limits_of(weight: Tensor, steps: Tensor) -> Tensor:
    """What clips leave of each group's largest magnitude, shape `(out, n_groups)`."""
    peaks = weight.unflatten(-1, (steps.shape[1], -1)).abs().amax(-1)
    return peaks * (1 - steps * CLIP_STEP)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_clips(bits: int, seed: int, symmetric: bool) -> None:
    torch.manual_seed(seed)
    inputs, weight = loud_inputs(128, seed), torch.randn(128, 128)
    scheme = Scheme(bits, GROUP, symmetric)
    ours = limits_of(weight, awq.search_clip(weight, moments_of(inputs).gram, scheme))
    theirs = quantizer(bits, symmetric)._compute_best_clip(weight, inputs).squeeze(-1)
    # Of 512 groups, at most 1 in 200 may differ: where two of the ten steps err alike to within rounding, the
    # order of additions decides. There the errors achieved must agree.
    differing = ~torch.isclose(ours, theirs, rtol=1e-6)
    assert differing.float().mean() <= 0.005
    errors = [group_errors(weight, limit, inputs, scheme)[differing] for limit in (ours, theirs)]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-4, atol=0)


def group_errors(weight: Tensor, limit: Tensor, inputs: Tensor, scheme: Scheme) -> Tensor:
    """Squared error of every output's part from each group, shape `(out, n_groups)`, in float64."""
    groups = weight.unflatten(-1, (-1, GROUP))
    clipped = fake_quantize(groups.clamp(-limit[..., None], limit[..., None]), scheme)
    delta = (clipped - groups).double()
    return torch.einsum("tng,ong->ton", inputs.double().unflatten(-1, (-1, GROUP)), delta).square().sum(0)


@pytest.mark.parametrize("bits", [3, 4])
@torch.no_grad()
def test_a_decoder_layer(bits: int) -> None:
    """A whole layer: o, down and their clips as AutoAWQ chooses them, from its scaled weights and inputs."""
    model = make_model(layers=1)
    layer = model.model.layers[0]
    inputs: dict[str, Tensor] = {}
    for name, linear in layer.named_modules():
        if isinstance(linear, nn.Linear):
            linear.register_forward_pre_hook(
                lambda _, args, name=name: inputs.update({name: args[0].clone()})
            )
    rows = make_rows(16, TOKENS // 16)
    recipe = search("native", model, bits, batches=[{"input_ids": rows}])

    # [STEP 1] The scales of the mappings with a single linear.
    reference = quantizer(bits, group_size=MODEL_GROUP)
    for previous, name in (("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")):
        linears = [with_copied_state(layer.get_submodule(name))]
        _, _, scale = reference._search_best_scale(
            layer, layer.get_submodule(previous), linears, inputs[name]
        )
        torch.testing.assert_close(recipe.scales[f"model.layers.0.{previous}"], scale, rtol=1e-4, atol=0)

    # [STEP 2] The clips, given the same scales. Rows aren't scaled yet: a group that is clipped on both sides has
    # its zero point halfway between two codes, so that any factor may tip it.
    columns = {
        name: decoder_layers(model)[0].scaled_columns(name, recipe.scales)
        for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    apply_scales(model, recipe)
    model(rows)
    for name, weight in columns.items():
        theirs = reference._compute_best_clip(weight, inputs[name]).squeeze(-1)
        same = torch.isclose(limits_of(weight, recipe.clips[f"model.layers.0.{name}"]), theirs, rtol=1e-4)
        assert same.float().mean() >= 0.99, name  # ties
    skipped = {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"}
    assert skipped.isdisjoint(recipe.clips)


# The engine `autoawq`, against AutoAWQ's quantize() -------------------------------------------------------------------


@torch.no_grad()
def autoawq_quantize(model: LlamaForCausalLM, rows: Tensor, bits: int, symmetric: bool) -> None:
    """AutoAWQ's whole search on a model, which it leaves scaled and clipped, not rounded."""
    reference = quantizer(bits, symmetric, MODEL_GROUP)  # first, since it silences the import's warning
    from awq.models.llama import LlamaAWQForCausalLM

    first: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    recorder = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: first.append((args, kwargs)), with_kwargs=True
    )
    model(rows, use_cache=False)
    recorder.remove()
    ((reference.inps,), reference.module_kwargs) = first[0]
    reference.awq_model = SimpleNamespace(
        model_type="llama",
        move_embed=LlamaAWQForCausalLM.move_embed,
        get_layers_for_scaling=LlamaAWQForCausalLM.get_layers_for_scaling,
    )
    reference.model, reference.modules, reference.modules_to_not_convert = model, model.model.layers, []
    reference.apply_clip = reference.export_compatible = True
    for module in model.modules():
        with_copied_state(module)
    reference.quantize()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="AutoAWQ moves the model between devices where it can")
@pytest.mark.parametrize(("kv_heads", "symmetric"), [(4, False), (2, False), (4, True)])
@torch.no_grad()
def test_the_engine_finds_what_autoawq_finds(kv_heads: int, symmetric: bool) -> None:
    """The weights that a recipe is about to round are those that AutoAWQ's own run leaves."""
    model, rows = make_model(kv_heads=kv_heads, width=128), make_rows(16, 16)
    batches = [{"input_ids": rows[:5]}, {"input_ids": rows[5:]}]
    recipe = search("autoawq", model, 4, batches=batches, symmetric=symmetric)
    autoawq_quantize(reference := copy.deepcopy(model), rows, 4, symmetric)
    for layer in decoder_layers(model):
        for name in layer.linears:
            full = layer.path(name)
            weight = clip_weight(layer.scaled_columns(name, recipe.scales), recipe.clips.get(full))
            if (rows_scale := recipe.scales.get(full)) is not None:
                weight = weight / rows_scale[:, None]
            theirs = reference.get_parameter(f"{full}.weight")
            same = torch.isclose(weight, theirs, rtol=1e-5)
            # AutoAWQ has scaled the rows of v and up before their clip search, which changes how ties round.
            assert same.float().mean() >= (0.99 if rows_scale is not None else 0.999), full
    for norm in ("input_layernorm", "post_attention_layernorm"):
        full = f"model.layers.1.{norm}"
        weight = model.get_parameter(f"{full}.weight") / recipe.scales[full]
        torch.testing.assert_close(weight, reference.get_parameter(f"{full}.weight"))


@pytest.mark.parametrize("bits", [3, 4])
def test_the_engines_agree_where_their_objectives_do(bits: int) -> None:
    model = make_model(layers=1)
    native, theirs = search("native", model, bits), search("autoawq", model, bits)
    assert (native.engine, theirs.engine) == ("native", "autoawq")
    for kind in ("scales", "clips", "errors"):
        assert getattr(native, kind).keys() == getattr(theirs, kind).keys(), kind
    for previous, linear in (("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")):
        scales = (recipe.scales[f"model.layers.0.{previous}"] for recipe in (native, theirs))
        torch.testing.assert_close(*scales, rtol=1e-5, atol=0)  # the same of 20 ratios
        name = f"model.layers.0.{linear}"
        assert native.clips[name].dtype == theirs.clips[name].dtype == torch.uint8
        assert native.clips[name].float().std() > 0.5  # the comparison isn't one of constants
        assert (native.clips[name] == theirs.clips[name]).float().mean() >= 0.99  # but for ties
        # A group's tied clips err alike, but not alike beside the other groups.
        assert native.errors[name] == pytest.approx(theirs.errors[name], rel=0.02)


def test_rows_of_zeros_and_odd_widths_are_clipped() -> None:
    """AutoAWQ takes outputs in multiples of 64 only, and a group of zeros has no peak to be relative to."""
    torch.manual_seed(0)
    inputs, weight = loud_inputs(128, 0), torch.randn(70, 128)
    weight[3] = 0.0
    steps = autoawq.clip_steps(quantizer(3), weight, inputs)
    assert steps.shape == (70, 4)
    assert not steps[3].any()
    expected = quantizer(3)._compute_best_clip(weight[:64], inputs).squeeze(-1)
    torch.testing.assert_close(limits_of(weight, steps)[:64], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("failing", [None, 1, 70])
def test_the_model_stays_as_it_is(
    kv_heads: int, failing: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit and in place, also where a search fails in the first layer or in the second one."""
    model, calls = make_model(kv_heads=kv_heads), 0
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in model.state_dict().items()}
    compute_loss = type(quantizer(4))._compute_loss

    def failing_loss(*args: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise RuntimeError("out of memory")
        return compute_loss(*args)

    monkeypatch.setattr(type(quantizer(4)), "_compute_loss", failing_loss)
    if failing is None:
        search("autoawq", model)
        assert calls == 2 * 20 * (4 if kv_heads == 4 else 3)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            search("autoawq", model)
    for name, weight in model.state_dict().items():
        pointer, value = before[name]
        assert weight.data_ptr() == pointer, name
        assert torch.equal(weight, value), name
    assert all(weight.requires_grad for weight in model.parameters())
    for module in model.modules():
        assert not {**module._forward_pre_hooks, **module._forward_hooks, **module._state_dict_hooks}


def test_a_routed_model_is_measured_on_its_executing_tokens(routed: RoutedForCausalLM) -> None:
    """Packed calls are repeated with their own plan; padding on the right executes nothing."""
    batches: list[Batch] = []
    for batch in make_batches():
        mask = torch.ones_like(batch["input_ids"])
        mask[0, -9:] = 0
        batches.append({**batch, "attention_mask": mask})
    precision = uniform(linear_shapes(routed), 4, {})
    seen: list[tuple[str, int]] = []
    theirs = autoawq.search(
        routed, batches, [precision], 16, progress=lambda name, tokens: seen.append((name, tokens))
    )[0]
    native = awq.search(routed, batches, [precision], 16)[0]
    assert theirs.tokens == native.tokens == dict(seen)
    assert theirs.tokens["model.layers.0"] == 192 - 2 * 9
    assert all(0 < theirs.tokens[f"model.layers.{i}"] < 192 - 2 * 9 for i in range(1, 5))
    for name in (*theirs.bits, *theirs.scales, *theirs.clips):
        assert "router" not in name
        assert "lm_head" not in name
    for index in range(5):  # the inputs are the same tokens, so the choice is the same
        name = f"model.layers.{index}.mlp.up_proj"
        torch.testing.assert_close(theirs.scales[name], native.scales[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_callers_mode_does_not_reach_the_recipe(mode: Callable[[], Any]) -> None:
    model = make_model(layers=1)
    with mode():
        recipe = search("autoawq", model)
    for tensor in (*recipe.scales.values(), *recipe.clips.values()):
        assert not tensor.is_inference()
    assert all(scale.dtype == torch.float32 for scale in recipe.scales.values())


def test_several_precisions_at_once() -> None:
    """Each as if it were alone; linears that share an input may not differ, others may."""
    model = make_model()
    shapes = linear_shapes(model)
    precisions = [uniform(shapes, 3, {"*.down_proj": 8}), uniform(shapes, 4, {})]
    mixed, plain = autoawq.search(model, make_batches(), precisions, MODEL_GROUP)
    alone = search("autoawq", model, 4)
    assert all(torch.equal(plain.scales[name], scale) for name, scale in alone.scales.items())
    assert all(torch.equal(plain.clips[name], clip) for name, clip in alone.clips.items())
    assert mixed.bits == precisions[0]
    down = "model.layers.0.mlp.down_proj"
    assert mixed.errors[down] == pytest.approx(search("autoawq", model, 8).errors[down])


def test_mixed_bits_of_one_input_are_refused_before_any_compute() -> None:
    model = make_model()
    model.model.layers[0].register_forward_pre_hook(lambda module, args: pytest.fail("the model ran"))
    bits = uniform(linear_shapes(model), 4, {"model.layers.1.self_attn.v_proj": 8})
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.q_proj has 4 and .*v_proj has 8; .* another engine"
    ):
        ENGINES["autoawq"](model, make_batches(), [bits], MODEL_GROUP)


def test_a_search_without_a_finite_error_names_the_layer() -> None:
    model = make_model()
    model.model.layers[1].mlp.down_proj.weight.data.mul_(
        1e25
    )  # the MLP's output stays finite, not its square
    with pytest.raises(
        ValueError, match=r"model\.layers\.1, mlp\.gate_proj, mlp\.up_proj at 4 bits: no AWQ scale"
    ):
        search("autoawq", model)


def test_too_few_tokens_name_the_layer() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj saw 192 .* more rows"):
        search("autoawq", make_model(), min_tokens=193)


# The package ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_import() -> Iterator[None]:
    """The package is imported anew, before the test and after it."""
    autoawq.quantizer_class.cache_clear()
    yield
    autoawq.quantizer_class.cache_clear()


@pytest.mark.usefixtures("fresh_import")
def test_the_packages_farewell_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer(4)
    autoawq.quantizer_class.cache_clear()
    monkeypatch.delitem(sys.modules, "awq")  # its submodules stay: only the farewell is said again
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        quantizer(4)
        assert caught == []
        assert list(warnings.filters) == filters


@pytest.mark.usefixtures("fresh_import")
def test_other_warnings_of_the_import_are_heard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (package := tmp_path / "awq" / "quantize").mkdir(parents=True)
    (package / "quantizer.py").write_text("class AwqQuantizer: ...")
    (tmp_path / "awq" / "__init__.py").write_text("import warnings\nwarnings.warn('worth knowing')")
    for name in [name for name in sys.modules if name.split(".")[0] == "awq"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="worth knowing"):
        quantizer(4)
    for name in [name for name in sys.modules if name.split(".")[0] == "awq"]:
        del sys.modules[name]


@pytest.mark.usefixtures("fresh_import")
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "awq.quantize.quantizer", None)
    with pytest.raises(ImportError, match=r"pip install autoawq==0\.2\.9, or choose another engine"):
        search("autoawq", make_model())


# What it comes to -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantized(model: LlamaForCausalLM, recipe: Recipe) -> LlamaForCausalLM:
    """A copy with a recipe's rounded weights, in float32."""
    model = copy.deepcopy(model)
    for layer in decoder_layers(model):
        for name, linear in layer.linears.items():
            codes, scales, zeros = quantized_weight(layer, name, recipe)
            linear.weight.copy_(((codes - zeros) * scales).flatten(-2))
        scale_vectors(layer, recipe)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
@torch.no_grad()
def test_native_is_as_good_as_autoawq(bits: int) -> None:
    """Mean squared error of the logits on rows that calibration hasn't seen, mean over models.

    On one model either engine may win by a third; the mean of these is less noisy, and about half of rtn's error.
    """
    errors = dict.fromkeys((*COMPARED, "rtn"), 0.0)
    for seed in range(8):
        model, rows = make_model(seed, kv_heads=4 if seed % 2 else 2), make_rows(32, 24, seed=2)
        expected = model(rows).logits
        recipes = {engine: search(engine, model, bits) for engine in COMPARED}
        recipes["rtn"] = round_to_nearest(uniform(linear_shapes(model), bits, {}), MODEL_GROUP)
        for engine, recipe in recipes.items():
            errors[engine] += (quantized(model, recipe)(rows).logits - expected).square().mean().item()
    assert errors["native"] <= 1.1 * errors["autoawq"]
    assert errors["autoawq"] <= 0.8 * errors["rtn"]
