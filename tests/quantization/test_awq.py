from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qtale_lightning.architectures.llama import LLAMA
from qtale_lightning.models import RoutedForCausalLM, Routing
from qtale_lightning.quantization import awq
from qtale_lightning.quantization.calibration import Moments, collect_moments, layer_by_layer
from qtale_lightning.quantization.mappings import DecoderLayer, decoder_layers, linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import Recipe, clip_weight, quantized_weight, round_to_nearest
from qtale_lightning.quantization.rtn import Scheme, fake_quantize
from qtale_lightning.quantization.search import Observed

MakeModel = Callable[..., LlamaForCausalLM]
MakeRouted = Callable[..., RoutedForCausalLM]
Search = Callable[..., Recipe]
Apply = Callable[[nn.Module, Recipe], None]

GROUP = 16


def logits(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    with torch.no_grad():
        return model(rows).logits


def test_second_moments_give_the_output_error() -> None:
    torch.manual_seed(0)
    inputs, delta = torch.randn(300, 48), torch.randn(20, 48)
    moments = Moments.zeros(48)
    moments.add(inputs)
    expected = (inputs @ delta.T).square().sum()
    torch.testing.assert_close(awq.output_error(delta, moments.gram), expected, rtol=1e-5, atol=0)


def test_grouped_query_attention_has_no_scales_between_v_and_o(
    make_model: MakeModel, search: Search, rows: Tensor
) -> None:
    scaled = {name.split(".", 3)[3] for name in search(make_model(kv_heads=2), rows).scales}
    assert scaled == {"input_layernorm", "post_attention_layernorm", "mlp.up_proj"}
    scaled = {name.split(".", 3)[3] for name in search(make_model(kv_heads=4), rows).scales}
    assert scaled == {"input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"}


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("bits", [4, 3])
def test_awq_beats_round_to_nearest(
    bits: int,
    kv_heads: int,
    symmetric: bool,
    make_model: MakeModel,
    search: Search,
    apply: Apply,
    rows: Tensor,
) -> None:
    before = logits(make_model(kv_heads), rows)
    recipe = search(make_model(kv_heads), rows, bits, symmetric=symmetric)
    errors, plain = [], round_to_nearest(recipe.bits, GROUP, symmetric)
    for tried in (recipe, plain):
        model = make_model(kv_heads)
        apply(model, tried)
        errors.append((logits(model, rows) - before).square().mean())
    assert errors[0] < errors[1]
    # The log says the same of the linears that only their own search decides.
    for layer, run in layer_by_layer(make_model(kv_heads), [{"input_ids": rows}]):
        rounded = awq.output_errors(layer, collect_moments(layer, run, 1), plain)
        for name in (layer.path("self_attn.o_proj"), layer.path("mlp.down_proj")):
            assert recipe.errors[name] < rounded[name], name


@torch.no_grad()
def test_the_log_holds_the_errors_of_the_outputs(
    make_model: MakeModel, search: Search, apply: Apply, rows: Tensor
) -> None:
    model = make_model()
    up, name = model.model.layers[0].mlp.up_proj, "model.layers.0.mlp.up_proj"
    inputs: list[Tensor] = []
    hook = up.register_forward_pre_hook(lambda linear, args: inputs.append(args[0]))
    recipe = search(model, rows)
    hook.remove()
    before = up(inputs[0])
    apply(model, recipe)
    scaled = inputs[0] / recipe.scales["model.layers.0.post_attention_layernorm"]
    after = up(scaled) * recipe.scales[name]  # its rows were divided by the scales of down's inputs
    measured = (after - before).square().mean().item()
    assert recipe.errors[name] == pytest.approx(measured, rel=1e-4)  # float32 sums in another order


def test_search_leaves_the_model_alone(make_model: MakeModel, search: Search, rows: Tensor) -> None:
    model = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    layers = model.model.layers
    seen: list[tuple[str, int]] = []
    precisions = [uniform(linear_shapes(model), bits, {}) for bits in (4, 3)]
    recipes = awq.search(
        model,
        [{"input_ids": rows}],
        precisions,
        GROUP,
        progress=lambda name, tokens: seen.append((name, tokens)),
    )
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.model.layers is layers
    assert seen == [("model.layers.0", rows.numel()), ("model.layers.1", rows.numel())]
    assert [recipe.bits for recipe in recipes] == precisions
    assert recipes[1].tokens == dict(seen)
    # One pass for two widths finds what a pass for each finds.
    alone = search(model, rows, 3)
    assert all(torch.equal(scale, recipes[1].scales[name]) for name, scale in alone.scales.items())
    assert all(torch.equal(clip, recipes[1].clips[name]) for name, clip in alone.clips.items())
    assert alone.errors == recipes[1].errors


def test_salience_is_measured_on_executing_tokens(
    make_routed: MakeRouted, search: Search, rows: Tensor
) -> None:
    model = make_routed()
    layer, name = model.model.layers[1], "model.layers.1.input_layernorm"
    recipe = search(model, rows)

    # The scales of q, k and v are made of the executing tokens' normalised states alone.
    routing, inputs = Routing(), []
    hook = layer.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    with torch.no_grad():
        model(rows, routing=routing, use_cache=False)
        hook.remove()
        chosen = routing.gates[1]
        attention = layer.self_attn
        weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        executing, everyone = (
            awq.scale_candidates(weights, moments_of(layer.input_layernorm(states)), GROUP)
            for states in (inputs[0][chosen], inputs[0])
        )
    assert recipe.tokens == {f"model.layers.{i}": n for i, n in enumerate(routing.executed(3).tolist())}
    assert recipe.tokens["model.layers.1"] < rows.numel()
    found = recipe.scales[name]
    # The first candidate is made of the weights alone.
    assert any(torch.allclose(found, scale, rtol=1e-4) for scale in executing[1:])
    assert not any(torch.allclose(found, scale, rtol=1e-3) for scale in everyone)


def moments_of(inputs: Tensor) -> Moments:
    moments = Moments.zeros(inputs.shape[-1])
    moments.add(inputs)
    return moments


def test_linears_of_one_input_may_have_different_bits(
    make_model: MakeModel, search: Search, apply: Apply, rows: Tensor
) -> None:
    model = make_model()
    mixed = uniform(linear_shapes(model), 3, {"*.v_proj": 8})
    [recipe] = awq.search(model, [{"input_ids": rows}], [mixed], GROUP)
    low = search(model, rows, 3)
    assert recipe.bits == mixed
    for layer in decoder_layers(model):
        q, k, v = (layer.path(f"self_attn.{name}_proj") for name in "qkv")
        largest = {name: quantized_weight(layer, name[-16:], recipe).codes.max() for name in (q, k, v)}
        assert largest == {q: 7, k: 7, v: 255}
        assert recipe.errors[v] < low.errors[v] / 100  # 32 times finer: about a 1000th
    error, low_error = (distance(make_model, tried, apply, rows) for tried in (recipe, low))
    assert error < low_error


def distance(make_model: MakeModel, recipe: Recipe, apply: Apply, rows: Tensor) -> float:
    """Mean squared distance of the quantized model's logits."""
    model = make_model()
    before = logits(model, rows)
    apply(model, recipe)
    return (logits(model, rows) - before).square().mean().item()


@torch.no_grad()
@pytest.mark.parametrize(
    ("block", "norm", "keep_kv"),
    [
        ("self_attn", "input_layernorm", False),
        ("self_attn", "input_layernorm", True),
        ("mlp", "post_attention_layernorm", False),
    ],
)
def test_shared_scales_are_chosen_by_the_output_of_their_block(
    block: str, norm: str, keep_kv: bool, make_routed: MakeRouted, search: Search, rows: Tensor
) -> None:
    """By running the routed model's own layer, with q (gate) at fewer bits than the others.

    Where tokens that skip leave keys and values, too, the block has those that execute as its outputs.
    """
    model = make_routed(keep_kv=keep_kv)
    low = {"self_attn": "q_proj", "mlp": "gate_proj"}[block]
    bits = uniform(linear_shapes(model), 4, {f"*.{low}": 2})
    [recipe] = awq.search(model, [{"input_ids": rows}], [bits], GROUP)
    layer = decoder_layers(model)[1]
    names = next(mapping.linears for mapping in LLAMA.mappings if mapping.previous == norm)
    calls: dict[str, Any] = {}
    for name in (block, norm):
        layer.module.get_submodule(name).register_forward_hook(
            lambda module, args, kwargs, output, name=name: calls.update({name: (args, kwargs, output)}),
            with_kwargs=True,
        )
    model(rows, routing=Routing(align=False), use_cache=False)
    (args, kwargs, expected), (seen, _, normed) = calls[block], calls[norm]
    residual = seen[0]
    if keep_kv:
        residual, normed = (args[2].asked(states) for states in (residual, normed))
    assert residual.shape == expected.shape
    exact = {name: layer.linears[name].weight.clone() for name in names}
    candidates = awq.scale_candidates([*exact.values()], moments_of(normed), GROUP)

    def error(scale: Tensor) -> float:
        for name, weight in exact.items():
            rounded = fake_quantize(weight * scale, recipe.scheme(layer.path(name))) / scale
            layer.linears[name].weight.copy_(rounded)
        delta = layer.module.get_submodule(block)(*args, **kwargs) - expected
        return (delta.square().sum(-1) / residual.square().sum(-1)).sum().item()

    # float32 sums in another order: candidates whose errors agree to 1e-4 may change places.
    expected_scale, _ = awq.best_by_halving(candidates, error)
    errors = [error(scale) for scale in (recipe.scales[layer.path(norm)], expected_scale, candidates[0])]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    assert errors[2] > 1.3 * errors[1]  # another choice would be seen


def test_halving_finds_the_bottom_of_a_valley_in_nine_tries() -> None:
    candidates = [torch.tensor(float(i)) for i in range(20)]
    for bottom in range(20):
        tried: list[float] = []

        def error(scale: Tensor, bottom: int = bottom, tried: list[float] = tried) -> float:
            tried.append(scale.item())
            return abs(scale.item() - bottom)

        assert awq.best_by_halving(candidates, error) == (candidates[bottom], 0)
        assert len(tried) == len(set(tried)) <= 9


def test_candidates_without_a_finite_error_are_passed_over() -> None:
    candidates = [torch.tensor(float(i)) for i in range(20)]

    def error(scale: Tensor) -> float:
        return float("nan") if scale.item() < 10 else scale.item()

    assert awq.best_by_halving(candidates, error) == (candidates[10], 10)
    assert awq.best_of_all(candidates, error) == (candidates[10], 10)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_clip_is_the_best_of_those_that_can_be_applied(symmetric: bool) -> None:
    torch.manual_seed(0)
    weight, scheme, salience = torch.randn(64, 64), Scheme(3, GROUP, symmetric), torch.ones(64)
    weight[:, ::GROUP] *= 5  # in each group a large weight that hardly matters: strong clips pay
    salience[::GROUP] = 1e-4

    def errors(steps: Tensor) -> Tensor:
        delta = fake_quantize(clip_weight(weight, steps), scheme) - weight
        return (delta.square() * salience).unflatten(1, (-1, GROUP)).sum(-1)

    found = awq.search_clip(weight, salience.diag(), scheme)
    assert {0, awq.CLIP_STEPS - 1} <= set(found.unique().tolist())
    every = torch.stack([errors(torch.full_like(found, step)) for step in range(awq.CLIP_STEPS)])
    torch.testing.assert_close(errors(found), every.amin(0), rtol=1e-5, atol=0)  # sums in another order


def test_a_search_without_a_finite_error_names_the_layer(
    make_model: MakeModel, search: Search, rows: Tensor
) -> None:
    model = make_model()
    # The MLP's output stays finite, not its square.
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1e25)
    with pytest.raises(
        ValueError, match=r"model\.layers\.1, .*gate_proj at 4 bits.*: no AWQ scale has a finite"
    ):
        search(model, rows)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_callers_mode_does_not_reach_the_search(
    mode: Callable[[], AbstractContextManager[None]],
    make_model: MakeModel,
    search: Search,
    apply: Apply,
    rows: Tensor,
) -> None:
    model = make_model()
    with mode():
        recipe = search(model, rows)
    tensors = [*recipe.scales.values(), *recipe.clips.values()]
    assert not any(tensor.is_inference() for tensor in tensors)
    assert all(scale.dtype == torch.float32 for scale in recipe.scales.values())
    # The first linears read what the norm gives in float32 in either mode: the sums, too, must be float32 ones. Which
    # scale is best may differ: blocks run in the caller's mode.

    def gram() -> Tensor:
        layer, run = next(layer_by_layer(model, [{"input_ids": rows}]))
        return collect_moments(layer, run, 1)["self_attn.q_proj"].gram

    plain = gram()
    with mode():
        torch.testing.assert_close(gram(), plain, rtol=1e-5, atol=1e-5)
    apply(model, recipe)


@pytest.mark.parametrize("kind", ["errors", "damage"])
def test_what_leaves_an_error_that_isnt_finite_is_refused(
    kind: str, make_model: MakeModel, rows: Tensor
) -> None:
    """Whatever the engine: bits are given, and errors reported, by these numbers."""

    def search_layer(layer: DecoderLayer, seen: Observed, recipe: Recipe) -> None:
        getattr(recipe, kind)[layer.path("mlp.down_proj")] = float("nan") if "1" in layer.name else 1.0

    model = make_model()
    bits = uniform(linear_shapes(model), 4, {})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj at 4 bits has no finite"):
        awq.Search(search_layer)(model, [{"input_ids": rows}], [bits], GROUP)
