"""Widths by pattern and by budget. The error tables are made up; one test takes a search's own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM

from qtale_lightning.architectures.llama import LLAMA
from qtale_lightning.quantization import awq
from qtale_lightning.quantization.mappings import decoder_layers, linear_shapes, split_name
from qtale_lightning.quantization.precision import CANDIDATES, allocate, average_bits, neighbours, uniform
from qtale_lightning.quantization.recipe import Recipe, clip_weight
from qtale_lightning.quantization.rtn import fake_quantize

Shapes = dict[str, tuple[int, int]]
Errors = dict[str, dict[int, float]]  # by linear and bits

Q, K, V, O = (f"model.layers.0.self_attn.{name}_proj" for name in "qkvo")  # noqa: E741
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def recipes(errors: Errors) -> dict[int, Recipe]:
    """What searches at each width would log: damage adds up over the linears of an input; their own errors are 9."""
    made = {}
    for width in next(iter(errors.values())):
        damage: dict[str, float] = {}
        for name, error in errors.items():
            layer, mapping = split_name(name, LLAMA)
            previous = f"{layer}.{mapping.previous}"
            damage[previous] = damage.get(previous, 0.0) + error[width]
        logged = dict.fromkeys(errors, 9.0)
        made[width] = Recipe("made up", dict.fromkeys(errors, width), 16, errors=logged, damage=damage)
    return made


def total_error(recipe: Recipe) -> float:
    return sum(recipe.damage.values())


def halving(size: float) -> dict[int, float]:
    """An error that each bit quarters, as that of uniform rounding."""
    return {width: size * 4.0**-width for width in CANDIDATES}


def test_patterns_and_the_last_match_wins() -> None:
    shapes = dict.fromkeys((Q, V, UP, DOWN, "model.layers.1.mlp.down_proj"), (16, 16))
    assert uniform(shapes, 4, {}) == dict.fromkeys(shapes, 4)
    bits = uniform(shapes, 4, {"*.down_proj": 8, "model.layers.0.*": 3, "*.[qv]_proj": 2})
    assert bits == {Q: 2, V: 2, UP: 3, DOWN: 3, "model.layers.1.mlp.down_proj": 8}
    assert uniform(shapes, 4, {"model.layers.0.*": 3, "*.down_proj": 8})[DOWN] == 8


@pytest.mark.parametrize("pattern", ["*.lm_head", "down_proj", "*.DOWN_PROJ"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"matches none of the linears, such as model\.layers\.0\.mlp\.down"):
        uniform({DOWN: (16, 16)}, 4, {"*": 3, pattern: 8})


def test_average_bits_by_hand() -> None:
    # 2·3 weights at 4 bits and 4·6 at 2 bits: (24 + 48) / 30.
    assert average_bits({Q: (2, 3), DOWN: (4, 6)}, {Q: 4, DOWN: 2}) == pytest.approx(2.4)


def test_bits_go_where_the_error_is_larger() -> None:
    shapes = dict.fromkeys((O, DOWN), (16, 16))
    recipe = allocate(shapes, recipes({O: halving(1.0), DOWN: halving(9.0)}), 3.5)
    assert recipe.bits == {O: 3, DOWN: 4}
    assert recipe.damage["model.layers.0.mlp.up_proj"] == pytest.approx(9.0 * 4.0**-4)
    # By weight, not by linear: as much error of a linear twice as large is as dear to take away.
    shapes[DOWN] = (32, 16)
    assert allocate(shapes, recipes({O: halving(1.0), DOWN: halving(1.0)}), 2.4).bits == {O: 3, DOWN: 2}


def test_linears_that_share_an_input_share_bits() -> None:
    shapes = {Q: (16, 16), K: (8, 16), V: (8, 16), O: (16, 16)}
    errors = {Q: halving(0.01), K: halving(0.01), V: halving(9.0), O: halving(1.0)}
    # All of q, k and v take the bits that v's error asks for.
    recipe = allocate(shapes, recipes(errors), 3.0)
    assert recipe.bits == {Q: 3, K: 3, V: 3, O: 3}
    recipe = allocate(shapes, recipes(errors), 3.7)
    assert recipe.bits == {Q: 4, K: 4, V: 4, O: 3}


def test_a_width_above_the_hull_is_skipped() -> None:
    # At 3 bits hardly better than at 2: the step to 4 is worth more a bit.
    shapes = dict.fromkeys((O, DOWN), (16, 16))
    flat = {2: 1.0, 3: 0.99, 4: 0.1}
    assert sorted(allocate(shapes, recipes({O: flat, DOWN: flat}), 3.0).bits.values()) == [2, 4]


def test_bits_that_make_it_worse_are_not_spent() -> None:
    shapes = dict.fromkeys((O, DOWN), (16, 16))
    worse = {2: 0.5, 4: 0.1, 8: 0.2}
    assert allocate(shapes, recipes({O: worse, DOWN: {2: 0.5, 4: 0.1, 8: 0.0}}), 8).bits == {O: 4, DOWN: 8}


@pytest.mark.parametrize("budget", [1.9, 8.1, float("nan")])
def test_budgets_outside_the_widths_are_refused(budget: float) -> None:
    with pytest.raises(ValueError, match=r"are outside the widths to choose from, \[2, 3, 4, 8\]"):
        allocate({DOWN: (16, 16)}, recipes({DOWN: halving(1.0)}), budget)


def test_one_width_is_never_given_up_for_a_small_linear() -> None:
    """A small linear's dear steps come first, and leave too little for the large one's."""
    shapes = {O: (16, 100), DOWN: (16, 10)}
    errors = {O: {2: 1.0, 3: 0.5, 4: 0.4}, DOWN: {2: 0.5, 3: 0.3, 4: 0.2}}
    assert allocate(shapes, recipes(errors), 3.0).bits == {O: 3, DOWN: 3}


@pytest.mark.parametrize("seed", range(20))
def test_budgets_on_random_tables(seed: int) -> None:
    """Budget held; no worse than a width that it allows for all; a larger budget never does worse."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    shapes: Shapes = {}
    for layer in range(3):
        for name in (Q, K, V, O, UP.replace("up", "gate"), UP, DOWN):
            shapes[name.replace("layers.0", f"layers.{layer}")] = (draw(1, 30), 16)
    # Falling with bits, but not always convex.
    errors: Errors = {}
    for name in shapes:
        drops = torch.rand(len(CANDIDATES), generator=generator) * torch.tensor([8.0, 4.0, 2.0, 1.0])
        left = drops.flip(0).cumsum(0).flip(0).tolist()
        errors[name] = dict(zip(CANDIDATES, left, strict=True))
    candidates = recipes(errors)
    before = float("inf")
    for budget in torch.arange(2, 8.001, 0.125).tolist():
        recipe = allocate(shapes, candidates, budget)
        assert recipe.bits.keys() == shapes.keys()
        assert average_bits(shapes, recipe.bits) <= budget + 1e-9  # a float64 quotient
        if budget in CANDIDATES:
            assert total_error(recipe) <= total_error(candidates[int(budget)]) + 1e-9  # sums in another order
        assert total_error(recipe) <= before + 1e-9
        before = total_error(recipe)
        by_input: dict[object, set[int]] = {}
        for name, width in recipe.bits.items():
            by_input.setdefault(split_name(name, LLAMA), set()).add(width)
        assert all(len(widths) == 1 for widths in by_input.values())
    assert recipe.bits == dict.fromkeys(shapes, 8)


def test_a_searchs_own_recipes(make_model: Callable[..., LlamaForCausalLM], rows: Tensor) -> None:
    model = make_model()
    shapes = linear_shapes(model)
    searched = awq.search(model, [{"input_ids": rows}], [uniform(shapes, b, {}) for b in (2, 3, 4)], 16)
    candidates = dict(zip((2, 3, 4), searched, strict=True))
    recipe = allocate(shapes, candidates, 3.25)
    assert average_bits(shapes, recipe.bits) <= 3.25
    assert len(set(recipe.bits.values())) > 1
    assert total_error(candidates[4]) < total_error(recipe) < total_error(candidates[3])
    assert allocate(shapes, candidates, 4.0).bits == candidates[4].bits


@pytest.mark.parametrize(
    ("budget", "expected"), [(3.5, (3, 4)), (2.1, (2, 3)), (6.0, (4, 8)), (4.01, (4, 8))]
)
def test_a_budget_mixes_the_two_widths_around_it(budget: float, expected: tuple[int, int]) -> None:
    assert neighbours(budget) == expected


@torch.no_grad()
def test_damage_is_what_happens_to_the_residual_stream(
    make_model: Callable[..., LlamaForCausalLM], rows: Tensor
) -> None:
    """By rounding the linears of one input in the model, and looking at the stream behind their block."""
    model = make_model()
    [recipe] = awq.search(model, [{"input_ids": rows}], [uniform(linear_shapes(model), 3, {})], 16)
    layer = decoder_layers(model)[1]
    seen: dict[str, Tensor] = {}
    for name in ("self_attn", "mlp"):
        layer.module.get_submodule(name).register_forward_hook(
            lambda module, args, kwargs, output, name=name: seen.update(
                {name: output[0] if isinstance(output, tuple) else output}
            ),
            with_kwargs=True,
        )
    for name in ("input_layernorm", "post_attention_layernorm"):
        layer.module.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.update({name: args[0]})
        )
    model(rows)
    exact = dict(seen)
    for mapping in LLAMA.mappings:
        kept = {name: layer.linears[name].weight.clone() for name in mapping.linears}
        scale = recipe.scales[layer.path(mapping.previous)]
        for name in mapping.linears:
            clips = recipe.clips.get(layer.path(name)) if len(mapping.linears) == 1 else None
            clipped = clip_weight(kept[name] * scale, clips)
            layer.linears[name].weight.copy_(fake_quantize(clipped, recipe.scheme(layer.path(name))) / scale)
        model(rows)
        block = mapping.linears[0].split(".")[0]
        stream = exact["input_layernorm" if block == "self_attn" else "post_attention_layernorm"]
        change, size = (x.square().sum(-1) for x in (seen[block] - exact[block], stream))
        # Shared scales are searched by the mean of shares; a single linear's error is known as a mean alone.
        expected = (change / size).mean() if len(mapping.linears) > 1 else change.mean() / size.mean()
        assert recipe.damage[layer.path(mapping.previous)] == pytest.approx(expected.item(), rel=1e-3)
        for name, weight in kept.items():
            layer.linears[name].weight.copy_(weight)


@torch.no_grad()
def test_damage_is_measured_behind_the_norms_of_a_familys_blocks() -> None:
    """Gemma's: what joins the stream is the normed output, whatever the size of the block's own."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, initializer_range=0.1,
    )  # fmt: skip
    model, rows = Gemma3ForCausalLM(config).eval(), torch.randint(3, 97, (4, 16))
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.copy_(torch.randn_like(weight) * 0.3)
    [recipe] = awq.search(model, [{"input_ids": rows}], [uniform(linear_shapes(model), 3, {})], 16)
    layer = decoder_layers(model)[1]
    seen: dict[str, Tensor] = {}
    fronts = {"self_attn": "input_layernorm", "mlp": "pre_feedforward_layernorm"}
    for block, norm in layer.architecture.norms_behind.items():
        layer.module.get_submodule(norm).register_forward_hook(
            lambda module, args, output, block=block: seen.update({block: output})
        )
        layer.module.get_submodule(fronts[block]).register_forward_pre_hook(
            lambda module, args, block=block: seen.update({f"before {block}": args[0]})
        )
    model(rows)
    exact = dict(seen)
    for mapping in layer.architecture.mappings:
        kept = {name: layer.linears[name].weight.clone() for name in mapping.linears}
        scale = recipe.scales.get(layer.path(mapping.previous), torch.ones(()))
        for name, weight in kept.items():
            clipped = clip_weight(weight * scale, recipe.clips.get(layer.path(name)))
            layer.linears[name].weight.copy_(fake_quantize(clipped, recipe.scheme(layer.path(name))) / scale)
        model(rows)
        change, size = (
            x.square().sum(-1)
            for x in (seen[mapping.block] - exact[mapping.block], exact[f"before {mapping.block}"])
        )
        expected = (change / size).mean().item()
        assert recipe.damage[layer.path(mapping.previous)] == pytest.approx(expected, rel=1e-3)
        for name, weight in kept.items():
            layer.linears[name].weight.copy_(weight)
