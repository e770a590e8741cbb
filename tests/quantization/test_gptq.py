"""GPTQ's codes are those of the paper's recursion, and its recipes are packed, kept and run as any engine's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtale_lightning.quantization.calibration import Moments
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.engines import ENGINES
from qtale_lightning.quantization.gptq import Inverse, gptq_codes
from qtale_lightning.quantization.linear import QuantizedLinear
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import Recipe
from qtale_lightning.quantization.rtn import Scheme, fake_quantize

GROUP = 16
OUT, TOKENS = 24, 400


def inputs(width: int, seed: int = 0) -> Tensor:
    """Correlated and of several magnitudes, as activations are; without them no error could be made good."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(TOKENS, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return mixed * torch.rand(width, generator=generator).mul(3).exp() / width**0.5


def moments(x: Tensor) -> Tensor:
    found = Moments.zeros(x.shape[1])
    found.add(x)
    return found.gram


def weight_of(width: int) -> Tensor:
    return torch.randn(OUT, width, generator=torch.Generator().manual_seed(1)) * 0.1


def grid_of(group: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """A group's scale and zero point for each output, as round-to-nearest sets them, in float32."""
    group = group.float()
    top = 2**bits - 1
    if symmetric:
        scale = group.abs().amax(1).clamp(min=1e-5) / (2 ** (bits - 1) - 1)
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    low, high = group.amin(1), group.amax(1)
    scale = (high - low).clamp(min=1e-5) / top
    return scale, (-(low / scale).round()).clamp(0, top)


def by_the_paper(
    weight: Tensor, gram: Tensor, bits: int, group: int, symmetric: bool, percdamp: float, act_order: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The recursion column by column, nothing put off: OBQ's update with the Cholesky factor of the inverse Hessian."""
    w, h = weight.to(torch.float64, copy=True), gram.to(torch.float64, copy=True)
    out, width = w.shape
    for i in range(width):
        if h[i, i] == 0:
            h[i, i], w[:, i] = 1.0, 0.0
    order = sorted(range(width), key=lambda i: -float(h[i, i])) if act_order else list(range(width))
    beforehand = [grid_of(w[:, first : first + group], bits, symmetric) for first in range(0, width, group)]
    w, h = w[:, order], h[order][:, order]
    h += percdamp * h.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes = torch.zeros(out, width, dtype=torch.float64)
    scales, zeros = (torch.zeros(out, width // group, dtype=torch.float64) for _ in range(2))
    for i, at in enumerate(order):
        if act_order:
            scale, zero = beforehand[at // group]
        elif at % group == 0:
            scale, zero = grid_of(w[:, i : i + group], bits, symmetric)
        scales[:, at // group], zeros[:, at // group] = scale, zero
        codes[:, at] = (torch.round(w[:, i] / scale.double()) + zero).clamp(0, 2**bits - 1)
        error = (w[:, i] - (codes[:, at] - zero) * scale.double()) / u[i, i]
        for j in range(i + 1, width):
            w[:, j] -= error * u[i, j]
    return codes.to(torch.uint8), scales.float(), zeros.to(torch.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("bits", "width", "group", "symmetric"),
    [
        (4, 320, 16, False),  # two blocks and a half
        (3, 320, 32, True),
        (2, 192, 96, False),  # a block of one group, since two of them pass 128 columns
        (4, 512, 256, False),  # groups wider than a block
        (8, 64, 64, True),
    ],
)
def test_codes_equal_the_recursion_of_the_paper(
    bits: int, width: int, group: int, symmetric: bool, act_order: bool
) -> None:
    weight, x = weight_of(width), inputs(width)
    x[:, 5] = 0.0  # an input that is never there
    found = gptq_codes(weight, Inverse.of(moments(x), 0.01, act_order), Scheme(bits, group, symmetric))
    expected = by_the_paper(weight, moments(x), bits, group, symmetric, 0.01, act_order)
    for name, part, other in zip(("codes", "scales", "zeros"), found, expected, strict=True):
        assert part.dtype == other.dtype, name
        assert torch.equal(part, other), name
    assert found.quantized().dequantize()[:, 5].abs().max() == 0


@pytest.mark.parametrize("act_order", [False, True])
def test_errors_of_outputs_are_less_than_rounding_makes(act_order: bool) -> None:
    weight, x, scheme = weight_of(128), inputs(128), Scheme(3, 32)
    found = gptq_codes(weight, Inverse.of(moments(x), act_order=act_order), scheme)
    rounded = fake_quantize(weight, scheme)
    ours = (x @ (found.quantized().dequantize() - weight).T).square().sum()
    plain = (x @ (rounded - weight).T).square().sum()
    assert ours < 0.7 * plain


def test_second_moments_without_an_inverse_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"no inverse .*calibrate on more sequences, or give a larger percdamp"
    ):
        Inverse.of(-torch.eye(8))
    one = torch.ones(3, 8)
    with pytest.raises(ValueError, match="larger percdamp"):
        Inverse.of(one.T @ one, percdamp=0.0)
    Inverse.of(one.T @ one)


# ------------------------------------------------------------------------------------------------ as an engine's

Find = Callable[..., Recipe]


@pytest.fixture
def find(make_model: Any, rows: Tensor) -> Find:
    def run(bits: int = 4, **options: Any) -> Recipe:
        model = make_model()
        precision = uniform(linear_shapes(model), bits, {})
        return ENGINES["gptq"](model, [{"input_ids": rows}], [precision], GROUP, **options)[0]

    return run


def test_a_recipe_with_codes_is_kept_whole(find: Find, tmp_path: Path) -> None:
    recipe = find(act_order=True)
    assert recipe.codes.keys() == recipe.bits.keys()
    assert not recipe.scales
    assert not recipe.clips
    recipe.save(tmp_path / "recipe.safetensors")
    kept = Recipe.load(tmp_path / "recipe.safetensors")
    assert kept.bits == recipe.bits
    for name, own in recipe.codes.items():
        for part, other in zip(own, kept.codes[name], strict=True):
            assert torch.equal(part, other)


def test_its_codes_are_what_is_packed(find: Find, make_model: Any) -> None:
    for bits in (4, 3):
        recipe, model = find(bits), make_model()
        quantize_model(model, recipe)
        for name, own in recipe.codes.items():
            packed = model.get_submodule(name)
            assert isinstance(packed, QuantizedLinear)
            codes, scales, zeros = packed.quantized()
            assert torch.equal(codes.flatten(1).to(torch.uint8), own.codes)
            assert torch.equal(scales[..., 0], own.scales.half().float())
            assert torch.equal(zeros[..., 0].to(torch.uint8), own.zeros)


def test_codes_of_another_shape_are_of_another_model(find: Find, make_model: Any) -> None:
    recipe = find()
    del recipe.codes["model.layers.0.mlp.up_proj"]
    with pytest.raises(ValueError, match=r"codes of model\.layers\.0\.mlp\.up_proj is None"):
        quantize_model(make_model(), recipe)


def test_its_own_options_reach_the_recursion(find: Find) -> None:
    name = "model.layers.0.mlp.down_proj"
    plain = find().codes[name].codes
    assert torch.equal(find(act_order=False, percdamp=0.01).codes[name].codes, plain)
    for other in (find(act_order=True), find(percdamp=0.5)):
        assert not torch.equal(other.codes[name].codes, plain)


def test_errors_are_those_of_its_codes(find: Find, make_model: Any, rows: Tensor) -> None:
    recipe, model, seen = find(3), make_model(), {}
    name = "model.layers.0.mlp.down_proj"
    linear = model.get_submodule(name)
    handle = linear.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].flatten(0, 1)))
    with torch.no_grad():
        model(rows)
    handle.remove()
    delta = recipe.codes[name].quantized().dequantize() - linear.weight
    expected = (seen["x"] @ delta.T).square().mean().item()
    assert recipe.errors[name] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "engine", [name for name, one in ENGINES.items() if one.calibrates and not one.alone]
)
def test_layers_can_be_calibrated_on_what_quantized_ones_give(
    engine: str, make_model: Any, rows: Tensor, apply: Callable[..., None]
) -> None:
    """The first layer sees the same either way; a later one what the recipe itself makes of those before it."""
    if engine == "autoawq":
        pytest.importorskip("awq")
    model = make_model()
    precision = uniform(linear_shapes(model), 2, {})
    seen: dict[bool, list[Tensor]] = {}
    for sequential in (False, True):
        found: list[Tensor] = []
        layer = model.model.layers[1].mlp.down_proj
        handle = layer.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0].detach()))
        (recipe,) = ENGINES[engine](model, [{"input_ids": rows}], [precision], GROUP, sequential=sequential)
        handle.remove()
        seen[sequential] = found
    assert not torch.allclose(seen[True][0], seen[False][0], rtol=1e-3), "it sees the model's own layers"
    quantized = make_model()
    apply(quantized, recipe)
    with torch.no_grad():
        states = quantized.model(rows, output_hidden_states=True).hidden_states[1]
        position = quantized.model.rotary_emb(states, torch.arange(rows.shape[1])[None])
        expected = []
        handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
            lambda _, args: expected.append(args[0])
        )
        model.model.layers[1](states, position_embeddings=position, attention_mask=None)
        handle.remove()
    torch.testing.assert_close(seen[True][0], expected[0], rtol=1e-4, atol=1e-4)
