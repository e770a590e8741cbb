"""Batches stream through the model layer by layer; what is summed is what the model's own forward gives."""

import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qtale_lightning.architectures.llama import LLAMA
from qtale_lightning.models import RoutedForCausalLM, Routing
from qtale_lightning.quantization import awq
from qtale_lightning.quantization.calibration import (
    Batch,
    Moments,
    check_model,
    collect_moments,
    layer_by_layer,
)
from qtale_lightning.quantization.mappings import decoder_layers, linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import Recipe

MakeModel = Callable[..., LlamaForCausalLM]
MakeRouted = Callable[..., RoutedForCausalLM]
Search = Callable[..., Recipe]

GROUP = 16
LENGTHS = torch.tensor([24, 24, 20, 20, 17, 9, 9, 4])


def padded(rows: Tensor) -> dict[str, Tensor]:
    """One batch of rows of `LENGTHS`, padded on the right."""
    return {"input_ids": rows, "attention_mask": (torch.arange(rows.shape[1]) < LENGTHS[:, None]).long()}


def micro_batches(rows: Tensor) -> list[Batch]:
    """The same rows in batches of 3, 2, 2 and 1, each as wide as its longest row."""
    parts = torch.arange(len(rows)).split([3, 2, 2, 1])
    return [
        {name: tensor[part, : LENGTHS[part].max()] for name, tensor in padded(rows).items()} for part in parts
    ]


def moments_by_layer(model: nn.Module, batches: Sequence[Batch]) -> dict[str, dict[str, Moments]]:
    return {layer.name: collect_moments(layer, run, 1) for layer, run in layer_by_layer(model, batches)}


def assert_same_moments(ours: dict[str, dict[str, Moments]], theirs: dict[str, dict[str, Moments]]) -> None:
    """Within float32 sums in another order: 1e-4 of the largest second moment, where rows of 24 tokens add up."""
    assert ours.keys() == theirs.keys()
    for layer, by_input in ours.items():
        assert by_input.keys() == theirs[layer].keys() == {mapping.linears[0] for mapping in LLAMA.mappings}
        for name, moments in by_input.items():
            other = theirs[layer][name]
            assert moments.tokens == other.tokens, (layer, name)
            for sums in ("gram", "abs_sum"):
                a, b = getattr(moments, sums), getattr(other, sums)
                torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())


@torch.no_grad()
def moments_of_a_forward(model: nn.Module, batch: Batch, **more: object) -> dict[str, dict[str, Moments]]:
    """Summed by hooks while the whole model runs on one batch."""
    found: dict[str, dict[str, Moments]] = {}

    def summed(layer: str, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            found.setdefault(layer, {})[name] = Moments(x.T @ x, x.abs().sum(0), len(x))

        return hook

    with ExitStack() as stack:
        for layer in decoder_layers(model):
            for mapping in LLAMA.mappings:
                name = mapping.linears[0]
                hook = layer.linears[name].register_forward_pre_hook(summed(layer.name, name))
                stack.callback(hook.remove)
        model(**batch, use_cache=False, **more)
    return found


def test_moments_add_up_over_chunks() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(300, 48)
    moments = Moments.zeros(48)
    for chunk in inputs.view(3, 100, 48):
        moments.add(chunk.view(5, 20, 48))
    assert moments.tokens == 300
    torch.testing.assert_close(moments.abs_sum, inputs.abs().sum(0))
    torch.testing.assert_close(moments.gram, inputs.T @ inputs, rtol=1e-5, atol=1e-4)


def test_low_precision_inputs_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(
        5000, 8
    ).bfloat16()  # more than are converted at a time; bfloat16 counts to 256 alone
    moments = Moments.zeros(8)
    moments.add(inputs)
    assert moments.tokens == 5000
    exact = inputs.double()
    torch.testing.assert_close(moments.gram.double(), exact.T @ exact, rtol=1e-5, atol=1e-2)


def test_a_stream_sums_what_the_models_forward_sums(make_model: MakeModel, rows: Tensor) -> None:
    model = make_model(kv_heads=2)
    batch = {"input_ids": rows}
    assert_same_moments(moments_by_layer(model, [batch]), moments_of_a_forward(model, batch))


def test_a_padded_stream_sums_a_routed_models_executing_tokens(make_routed: MakeRouted, rows: Tensor) -> None:
    model, batch = make_routed(), padded(rows)
    streamed = moments_by_layer(model, [batch])
    assert_same_moments(streamed, moments_of_a_forward(model, batch, routing=Routing(align=False)))
    routing = Routing()
    with torch.no_grad():
        model(**batch, routing=routing, use_cache=False)
    executed = routing.executed(3).tolist()
    assert executed[0] == LENGTHS.sum()  # no router there, and padding counts nowhere
    assert max(executed[1:]) < executed[0]  # else routing would show nothing
    assert [moments["mlp.down_proj"].tokens for moments in streamed.values()] == executed


def test_padded_micro_batches_sum_as_one_batch(make_routed: MakeRouted, rows: Tensor) -> None:
    model = make_routed()
    assert_same_moments(moments_by_layer(model, micro_batches(rows)), moments_by_layer(model, [padded(rows)]))


def test_unpadded_batches_of_different_widths_sum_as_single_rows(make_model: MakeModel, rows: Tensor) -> None:
    model = make_model()
    batches = [{"input_ids": rows[:3]}, {"input_ids": rows[3:5, :9]}, {"input_ids": rows[5:, :17]}]
    singles = [{"input_ids": row[None]} for batch in batches for row in batch["input_ids"]]
    assert_same_moments(moments_by_layer(model, batches), moments_by_layer(model, singles))


@pytest.mark.parametrize("symmetric", [True, False])
def test_micro_batches_give_the_recipe_of_one_batch(
    symmetric: bool, make_routed: MakeRouted, rows: Tensor
) -> None:
    model = make_routed()
    precision = [uniform(linear_shapes(model), 3, {})]
    [many] = awq.search(model, micro_batches(rows), precision, GROUP, symmetric)
    [one] = awq.search(model, [padded(rows)], precision, GROUP, symmetric)
    assert many.tokens == one.tokens
    assert many.scales.keys() == one.scales.keys()
    for name, scale in one.scales.items():  # another of the 20 ratios would differ by 5% and more
        torch.testing.assert_close(many.scales[name], scale, rtol=1e-5, atol=0)
    # A clip at both ends of a group puts its asymmetric zero point half-way between two codes: there the order of
    # float32 sums decides, and may move single groups' errors and choices.
    for name, clip in one.clips.items():
        assert (many.clips[name] == clip).float().mean() > (0.999 if symmetric else 0.95), name
    for name, error in one.errors.items():
        assert many.errors[name] == pytest.approx(error, rel=1e-5 if symmetric else 0.05)


def test_layers_return_after_an_exception(
    make_model: MakeModel, make_routed: MakeRouted, rows: Tensor
) -> None:
    good = {"input_ids": rows}
    for model, bad, message in (
        (make_model(), {"input_ids": rows + 1000}, "out of range"),
        (make_routed(), good | {"attention_mask": torch.ones(8, 5)}, "attention_mask has shape"),
    ):
        layers = model.model.layers
        with pytest.raises((IndexError, ValueError), match=message):
            next(iter(layer_by_layer(model, [good, bad])))
        assert model.model.layers is layers
        with torch.no_grad():
            model(rows)


def test_layers_are_in_place_while_they_run(make_model: MakeModel, rows: Tensor) -> None:
    model = make_model()
    layers = model.model.layers
    for layer, _ in layer_by_layer(model, [{"input_ids": rows}]):
        assert model.model.layers is layers
        assert model.get_submodule(layer.name) is layer.module


def test_hidden_states_are_kept_of_one_layer_only(make_model: MakeModel, rows: Tensor) -> None:
    model = make_model(layers=3)
    states: list[weakref.ref[Tensor]] = []
    for module in (model.model.embed_tokens, *model.model.layers):
        module.register_forward_hook(lambda module, args, output: states.append(weakref.ref(output)))
    for _, run in layer_by_layer(model, [{"input_ids": rows[:4]}, {"input_ids": rows[4:]}]):
        assert [state() is not None for state in states[-2:]] == [True, True]
        run()
        assert not any(state() is not None for state in states[:-2])


@pytest.mark.slow
def test_one_layers_moments_at_a_time(make_model: MakeModel, rows: Tensor) -> None:
    """Counted when a layer's last input is about to be summed, and when the layer is done."""
    model = make_model(layers=3)

    def live() -> int:
        return sum(type(thing) is Moments for thing in gc.get_objects())

    gc.collect()
    before, counts = live(), []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda *_: counts.append(live() - before))
    precisions = [uniform(linear_shapes(model), bits, {}) for bits in (4, 3)]
    awq.search(
        model,
        [{"input_ids": rows}],
        precisions,
        GROUP,
        progress=lambda *_: counts.append(live() - before),
    )
    assert counts == [3, 4] * 3
    assert live() == before


def test_hooks_are_removed_after_an_error(make_model: MakeModel, search: Search, rows: Tensor) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="2000"):
        search(model, rows, min_tokens=2000)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("executing", [0, 5])
def test_too_few_tokens_name_the_layer(
    executing: int, make_model: MakeModel, search: Search, rows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    layer = model.model.layers[1]
    inner = layer.forward

    def forward(hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object) -> Tensor:
        if executing:
            cos, sin = (table[:, :executing] for table in position_embeddings)
            inner(hidden[:1, :executing], position_embeddings=(cos, sin))
        return hidden

    monkeypatch.setattr(layer, "forward", forward)
    with pytest.raises(
        ValueError, match=rf"model\.layers\.1\.self_attn\.q_proj saw {executing} .* more rows"
    ):
        search(model, rows)


def test_routers_that_skip_almost_all_leave_too_few_tokens(
    make_routed: MakeRouted, search: Search, rows: Tensor
) -> None:
    model = make_routed(reserved_tokens=1)
    nn.init.zeros_(model.model.layers[1].router.out.weight)  # p(execute) = 0.5 for all
    model.config.threshold = 0.9
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj saw 8 .* lower router thresh"):
        search(model, rows)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_activations_name_the_linear(
    bad: float, make_model: MakeModel, search: Search, rows: Tensor
) -> None:
    model = make_model()
    model.model.layers[1].post_attention_layernorm.weight.data[7] = bad
    with pytest.raises(ValueError, match=r"activations into model\.layers\.1\.mlp\.gate_proj have NaN"):
        search(model, rows)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_name_the_linear(bad: float, make_model: MakeModel) -> None:
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = bad
    with pytest.raises(ValueError, match=r"weights of model\.layers\.1\.mlp\.up_proj have NaN or infinity"):
        check_model(model, uniform(linear_shapes(model), 4, {}), GROUP)


def test_training_mode_is_refused(make_model: MakeModel) -> None:
    model = make_model().train()
    with pytest.raises(ValueError, match="training mode"):
        check_model(model, uniform(linear_shapes(model), 4, {}), GROUP)


def test_indivisible_widths_and_bits_are_refused_before_any_compute(
    make_model: MakeModel, rows: Tensor
) -> None:
    model = make_model()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    shapes = linear_shapes(model)
    good = uniform(shapes, 4, {})
    for bits, group, message in (
        (good, 48, r"width 64 of model\.layers\.0\.self_attn\.q_proj"),
        (uniform(shapes, 4, {"*.v_proj": 9}), GROUP, "bits must be from 2 to 8, got 9"),
        ({"model.layers.0.self_attn.q_proj": 4}, GROUP, "other linears than the model's 14"),
    ):
        with pytest.raises(ValueError, match=message):  # also where only a later precision is wrong
            awq.search(model, [{"input_ids": rows}], [good, bits], group)


def test_models_of_another_family_are_refused(make_model: MakeModel) -> None:
    with pytest.raises(ValueError, match=r"has no model\.layers"):
        linear_shapes(nn.Linear(2, 2))
    model = make_model()
    model.model.layers[1].mlp.gate_proj = nn.Sequential(model.model.layers[1].mlp.gate_proj)
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.gate_proj must be an nn\.Linear, is a Seq.*merged"
    ):
        linear_shapes(model)
    del model.model.layers[1].mlp.gate_proj
    with pytest.raises(ValueError, match=r"gate_proj must be an nn\.Linear, is missing"):
        linear_shapes(model)
    model.model.layers[1].mlp.gate_proj = type("QuantizedLinear", (nn.Module,), {})()
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj is quantized already"):
        linear_shapes(model)


def test_seven_linears_a_layer(make_routed: MakeRouted) -> None:
    shapes = linear_shapes(make_routed(kv_heads=2))
    assert len(shapes) == 21  # no router, embedding or head among them
    assert next(iter(shapes)) == "model.layers.0.self_attn.q_proj"
    assert shapes["model.layers.2.self_attn.v_proj"] == (32, 64)
    assert shapes["model.layers.1.mlp.down_proj"] == (64, 96)
