"""What a recipe does to a model, and how recipes are saved, refused and composed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qtale_lightning.architectures.llama import LLAMA
from qtale_lightning.models import RoutedForCausalLM, Routing
from qtale_lightning.quantization import awq
from qtale_lightning.quantization.mappings import decoder_layers, linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import (
    CLIP_STEP,
    Recipe,
    apply_scales,
    check_recipe,
    clip_weight,
    quantized_weight,
    round_to_nearest,
)
from qtale_lightning.quantization.rtn import Scheme, fake_quantize, quantize

MakeModel = Callable[..., LlamaForCausalLM]
MakeRouted = Callable[..., RoutedForCausalLM]
Search = Callable[..., Recipe]
Apply = Callable[[nn.Module, Recipe], None]

GROUP = 16


def same(ours: Recipe, theirs: Recipe) -> bool:
    """Everything equal, tensors bit for bit."""
    for kind in ("scales", "clips"):
        a, b = getattr(ours, kind), getattr(theirs, kind)
        if a.keys() != b.keys() or not all(torch.equal(tensor, b[name]) for name, tensor in a.items()):
            return False
    plain = ("engine", "bits", "group_size", "symmetric", "errors", "tokens")
    return all(getattr(ours, name) == getattr(theirs, name) for name in plain)


def hidden_states(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Between layers and after the last one, with the logits: all in one tensor."""
    with torch.no_grad():
        output = model(rows, output_hidden_states=True)
    return torch.cat([*output.hidden_states, output.logits], dim=-1)


@pytest.mark.parametrize(("kv_heads", "bias"), [(4, False), (2, False), (4, True)])
def test_scales_change_nothing_with_rounding_off(
    kv_heads: int, bias: bool, make_model: MakeModel, search: Search, rows: Tensor
) -> None:
    model = make_model(kv_heads, bias=bias)
    before = hidden_states(model, rows)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    apply_scales(model, search(model, rows))
    # float32: each weight takes one or two more roundings of 6e-8, through two layers and their norms.
    torch.testing.assert_close(
        hidden_states(model, rows), before, rtol=1e-4, atol=1e-4 * before.abs().max().item()
    )
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, weights[name])}
    assert "model.layers.1.input_layernorm.weight" in changed
    assert "model.layers.1.mlp.down_proj.weight" in changed
    assert ("model.layers.0.self_attn.o_proj.weight" in changed) == (kv_heads == 4)
    biases = {name.split(".", 3)[3] for name in changed if name.endswith("bias")}
    assert biases == ({"self_attn.v_proj.bias", "mlp.up_proj.bias"} if bias else set())


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_scales_leave_a_routed_models_decisions_alone(
    kv_heads: int, make_routed: MakeRouted, search: Search, rows: Tensor
) -> None:
    """Routers read the hidden states between layers, which scales don't touch."""
    model = make_routed(kv_heads)
    mask = (torch.arange(24) < torch.arange(24, 8, -2)[:, None]).long()

    def run() -> tuple[Routing, Tensor]:
        routing = Routing()
        with torch.no_grad():
            logits = model(rows, attention_mask=mask, routing=routing, use_cache=False).logits
        return routing, logits[mask.bool()]

    before, logits = run()
    recipe = search(model, rows)
    apply_scales(model, recipe)
    after, scaled = run()
    torch.testing.assert_close(scaled, logits, rtol=0, atol=1e-4 * logits.abs().max().item())
    assert 0.1 < before.stacked_gates().mean() < 0.9  # mixed decisions, else equality would show nothing
    assert torch.equal(after.stacked_gates(), before.stacked_gates())
    torch.testing.assert_close(after.stacked_logits(), before.stacked_logits(), rtol=0, atol=1e-3)


def test_quantized_linears_alone_are_scaled_clipped_and_rounded(
    make_model: MakeModel, search: Search, apply: Apply, rows: Tensor
) -> None:
    model = make_model()
    model.model.layers[1].router = nn.Linear(64, 2)
    recipe = search(model, rows)
    assert recipe.bits.keys() == linear_shapes(model).keys()
    assert not any("router" in name or "lm_head" in name for name in recipe.bits)
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    apply(model, recipe)

    up = "model.layers.1.mlp.up_proj"
    columns, divided = recipe.scales["model.layers.1.post_attention_layernorm"], recipe.scales[up]
    groups = (original[f"{up}.weight"] * columns).view(96, 4, GROUP)
    limit = groups.abs().amax(-1, keepdim=True) * (1 - recipe.clips[up].float() / 20)[..., None]
    assert recipe.clips[up].any()
    expected = fake_quantize(groups.clamp(-limit, limit).flatten(1), Scheme(4, GROUP)) / divided[:, None]
    # A division before or after a product: one float32 rounding.
    torch.testing.assert_close(model.model.layers[1].mlp.up_proj.weight.data, expected, rtol=1e-6, atol=1e-9)
    untouched = {"model.embed_tokens", "model.norm", "lm_head", "model.layers.1.router"}
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, original[name]) == (name.rpartition(".")[0] in untouched), name


def test_clips_by_hand() -> None:
    weight = torch.tensor([[4.0, -1.0, 3.0, -2.0]])
    steps = torch.tensor([[0, 5]], dtype=torch.uint8)  # of two groups: all of 4, 3/4 of 3
    assert clip_weight(weight, steps).tolist() == [[4.0, -1.0, 2.25, -2.0]]
    assert clip_weight(weight, None) is weight
    assert CLIP_STEP == 0.05


def test_rows_may_be_scaled_after_rounding(make_model: MakeModel, search: Search, rows: Tensor) -> None:
    """Dividing a row scales its groups as a whole: the codes are those of the divided weight.

    By powers of two here, whose division rounds nothing, so that equality is exact.
    """
    model = make_model()
    recipe = search(model, rows, 3)
    layer = decoder_layers(model)[0]
    for name, columns in (
        ("self_attn.v_proj", "input_layernorm"),
        ("mlp.up_proj", "post_attention_layernorm"),
    ):
        full = layer.path(name)
        divisors = recipe.scales[full] = torch.exp2(torch.arange(len(recipe.scales[full])) % 5 - 2.0)
        weight = layer.linears[name].weight.detach() * recipe.scales[layer.path(columns)]
        divided = clip_weight(weight / divisors[:, None], recipe.clips[full])
        expected, found = quantize(divided, recipe.scheme(full)), quantized_weight(layer, name, recipe)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), name


def test_low_precision_weights_are_rounded_in_float32(
    make_model: MakeModel, search: Search, rows: Tensor
) -> None:
    exact, low = make_model().bfloat16().float(), make_model().bfloat16()
    recipe = search(exact, rows)
    for ours, theirs in zip(decoder_layers(exact), decoder_layers(low), strict=True):
        for name in ours.linears:
            pairs = zip(
                quantized_weight(ours, name, recipe), quantized_weight(theirs, name, recipe), strict=True
            )
            assert all(torch.equal(a, b) for a, b in pairs), name


@pytest.mark.parametrize("symmetric", [False, True])
def test_round_to_nearest_needs_no_calibration(symmetric: bool, make_model: MakeModel, apply: Apply) -> None:
    model, original = make_model(), make_model()
    bits = uniform(linear_shapes(model), 4, {"*.down_proj": 3})
    recipe = round_to_nearest(bits, GROUP, symmetric)
    check_recipe(model, recipe)
    apply(model, recipe)
    for name, width in bits.items():
        expected = fake_quantize(original.get_parameter(f"{name}.weight"), Scheme(width, GROUP, symmetric))
        assert torch.equal(model.get_parameter(f"{name}.weight"), expected), name
    assert torch.equal(
        model.model.layers[0].input_layernorm.weight, original.model.layers[0].input_layernorm.weight
    )


@pytest.mark.parametrize("symmetric", [False, True])
def test_save_and_load(
    symmetric: bool, tmp_path: Path, make_model: MakeModel, search: Search, rows: Tensor
) -> None:
    recipe = search(make_model(), rows, symmetric=symmetric)
    assert recipe.symmetric == symmetric
    path = tmp_path / "awq-4bit.safetensors"
    recipe.save(path)
    assert same(Recipe.load(path), recipe)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_save_and_load_without_tensors(tmp_path: Path) -> None:
    recipe = round_to_nearest({"model.layers.0.mlp.up_proj": 2, "model.layers.0.mlp.down_proj": 8}, 32, True)
    recipe.save(tmp_path / "rtn.safetensors")
    assert same(Recipe.load(tmp_path / "rtn.safetensors"), recipe)


def test_load_refuses_what_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        Recipe.load(tmp_path / "nothing.safetensors")
    (tmp_path / "text").write_text("not tensors, but long enough to be read as a header of some length")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Recipe.load(tmp_path / "text")
    for metadata in (None, {"format": "qtale-quantization-1"}):
        save_file({"a": torch.ones(1)}, tmp_path / "other", metadata)
        with pytest.raises(ValueError, match="not a recipe in format"):
            Recipe.load(tmp_path / "other")


def test_a_recipe_of_another_model_is_refused(make_model: MakeModel, search: Search, rows: Tensor) -> None:
    recipe = search(make_model(kv_heads=4), rows)
    check_recipe(make_model(kv_heads=4), recipe)
    for other in (make_model(kv_heads=2), make_model(layers=3), make_model(layers=1)):
        before = {name: weight.clone() for name, weight in other.state_dict().items()}
        for refused in (check_recipe, apply_scales):
            with pytest.raises(ValueError, match="another model"):
                refused(other, recipe)
        assert all(torch.equal(weight, before[name]) for name, weight in other.state_dict().items())
    with pytest.raises(ValueError, match=r"bits of model\.layers\.1\.mlp\.down_proj is \(\), .* needs None"):
        check_recipe(make_model(layers=1), round_to_nearest(recipe.bits, GROUP))


def test_composing_one_recipe_gives_it(make_model: MakeModel, search: Search, rows: Tensor) -> None:
    recipe = search(make_model(), rows, symmetric=True)
    assert same(Recipe.compose(dict.fromkeys(recipe.bits, recipe)), recipe)
    plain = round_to_nearest(recipe.bits, GROUP)
    assert same(Recipe.compose(dict.fromkeys(plain.bits, plain)), plain)


@torch.no_grad()
def test_a_composition_quantizes_each_linear_as_its_part(
    make_model: MakeModel, search: Search, apply: Apply, rows: Tensor
) -> None:
    model = make_model()
    low, high = awq.search(
        model, [{"input_ids": rows}], [uniform(linear_shapes(model), bits, {}) for bits in (3, 8)], GROUP
    )
    # o at 8 bits behind v at 3 in the first layer, the other way round in the second; the same of up and down.
    attention, mlp = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    parts = {}
    for name in linear_shapes(model):
        first, shared = ".layers.0." in name, name.endswith(attention + mlp)
        parts[name] = low if first == shared else high
    mixed = Recipe.compose(parts)
    check_recipe(model, mixed)
    assert mixed.bits == {name: part.bits[name] for name, part in parts.items()}
    assert mixed.errors == {name: part.errors[name] for name, part in parts.items()}
    assert mixed.tokens == low.tokens
    assert any(not torch.equal(scale, high.scales[name]) for name, scale in low.scales.items())
    assert mixed.scales.keys() == low.scales.keys()
    for layer in decoder_layers(model):
        for mapping in layer.scaled_mappings():
            previous, part = layer.path(mapping.previous), parts[layer.path(mapping.linears[0])]
            assert torch.equal(mixed.scales[previous], part.scales[previous])
        for name in layer.linears:
            full = layer.path(name)
            part = parts[full]
            ours, theirs = quantized_weight(layer, name, mixed), quantized_weight(layer, name, part)
            assert torch.equal(ours.codes, theirs.codes), full
            assert torch.equal(ours.zeros, theirs.zeros), full
            # Rows are divided by what the mapping behind chose, not by what this part had for it.
            ones = torch.ones(len(ours.scales))
            instead = part.scales.get(full, ones) / mixed.scales.get(full, ones)
            torch.testing.assert_close(ours.scales, theirs.scales * instead[:, None, None], rtol=1e-6, atol=0)
            assert (full in mixed.clips) == (name not in LLAMA.not_clipped)

    # The logged errors hold in the composition.
    expected = make_model()
    inputs: dict[str, Tensor] = {}
    hooks = [
        expected.get_submodule(name).register_forward_pre_hook(
            lambda linear, args, name=name: inputs.update({name: args[0]})
        )
        for name in mixed.bits
    ]
    expected(rows)
    for hook in hooks:
        hook.remove()
    apply(model, mixed)
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"):
        previous = name.replace("o_proj", "v_proj").replace("down", "up")
        output = model.get_submodule(name)(inputs[name] / mixed.scales[previous])
        error = (output - expected.get_submodule(name)(inputs[name])).square().mean().item()
        assert mixed.errors[name] == pytest.approx(error, rel=1e-4)  # float32 sums in another order
