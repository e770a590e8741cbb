from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qtale_lightning.quantization import awq
from qtale_lightning.quantization.awq import AWQSearch, Moments, output_error
from qtale_lightning.quantization.rtn import fake_quantize

GROUP = 16
VOCABULARY = 96


def make_model(kv_heads: int = 4, bias: bool = False) -> LlamaForCausalLM:
    """Two layers, with a few loud channels in the norms, as trained models have."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=VOCABULARY,
        attention_bias=bias,
        mlp_bias=bias,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter[torch.randperm(64)[:4]] = 12.0
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=0.1)
    return model


@pytest.fixture
def rows() -> Tensor:
    return torch.randint(VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(1))


def search(model: LlamaForCausalLM, rows: Tensor, bits: int = 4, **options: object) -> AWQSearch:
    with torch.no_grad():
        return awq.search(model, lambda: model(rows), [bits], GROUP, **options)[bits]  # type: ignore[arg-type]


def hidden_states(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Between layers and after the last one, with the logits: all in one tensor."""
    with torch.no_grad():
        output = model(rows, output_hidden_states=True)
    return torch.cat([*output.hidden_states, output.logits], dim=-1)


@pytest.mark.parametrize(("kv_heads", "bias"), [(4, False), (2, False), (4, True)])
def test_scales_change_nothing_with_rounding_off(kv_heads: int, bias: bool, rows: Tensor) -> None:
    model = make_model(kv_heads, bias)
    before = hidden_states(model, rows)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    awq.apply_scales(model, search(model, rows))
    # float32: each weight takes one or two more roundings of 6e-8, through two layers and their norms.
    torch.testing.assert_close(
        hidden_states(model, rows), before, rtol=1e-4, atol=1e-4 * before.abs().max().item()
    )
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, weights[name])}
    assert "model.layers.1.input_layernorm.weight" in changed
    assert "model.layers.1.mlp.down_proj.weight" in changed
    assert ("model.layers.0.self_attn.o_proj.weight" in changed) == (kv_heads == 4)


def test_grouped_query_attention_has_no_scales_between_v_and_o(rows: Tensor) -> None:
    scaled = {name.split(".", 3)[3] for name in search(make_model(kv_heads=2), rows).scales}
    assert scaled == {"input_layernorm", "post_attention_layernorm", "mlp.up_proj"}
    scaled = {name.split(".", 3)[3] for name in search(make_model(kv_heads=4), rows).scales}
    assert scaled == {"input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"}


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("bits", [4, 3])
def test_awq_beats_round_to_nearest(kv_heads: int, bits: int, rows: Tensor) -> None:
    model = make_model(kv_heads)
    before = hidden_states(model, rows)
    result = search(model, rows, bits)

    rounded = make_model(kv_heads)
    with torch.no_grad():
        for name in awq.quantized_linear_names(rounded):
            weight = rounded.get_submodule(name).weight
            weight.copy_(fake_quantize(weight, bits, GROUP))
    awq.apply(model, result)
    error = (hidden_states(model, rows) - before).square().mean()
    assert error < (hidden_states(rounded, rows) - before).square().mean()
    # The log says the same of the linears that only their own search decides.
    for name, linear_error in result.errors.items():
        if name.endswith(("o_proj", "down_proj")):
            assert linear_error.awq < linear_error.rtn, name


@torch.no_grad()
def test_the_log_holds_the_errors_of_the_outputs(rows: Tensor) -> None:
    model = make_model()
    up, name = model.model.layers[0].mlp.up_proj, "model.layers.0.mlp.up_proj"
    inputs: list[Tensor] = []
    hook = up.register_forward_pre_hook(lambda linear, args: inputs.append(args[0]))
    result = search(model, rows)
    hook.remove()
    before = up(inputs[0])
    rtn = inputs[0] @ fake_quantize(up.weight, 4, GROUP).T
    awq.apply(model, result)
    scaled = inputs[0] / result.scales["model.layers.0.post_attention_layernorm"]
    after = up(scaled) * result.scales[name]  # its rows were divided by the scales of down's inputs
    measured = [(output - before).square().mean().item() for output in (rtn, after)]
    assert result.errors[name] == pytest.approx(measured, rel=1e-4)  # float32 sums in another order


def test_apply_quantizes_the_scaled_clipped_linears_alone(rows: Tensor) -> None:
    model = make_model()
    model.model.layers[1].router = nn.Linear(64, 2)
    result = search(model, rows)
    assert not any("router" in name or "lm_head" in name for name in awq.quantized_linear_names(model))
    original = {name: weight.clone() for name, weight in model.state_dict().items()}
    awq.apply(model, result)

    layer = "model.layers.1"
    columns, rows_ = result.scales[f"{layer}.post_attention_layernorm"], result.scales[f"{layer}.mlp.up_proj"]
    scaled = original[f"{layer}.mlp.up_proj.weight"] * columns / rows_[:, None]
    limit = result.clips[f"{layer}.mlp.up_proj"].repeat_interleave(GROUP, dim=1)
    expected = fake_quantize(scaled.clamp(-limit, limit), 4, GROUP)
    torch.testing.assert_close(model.model.layers[1].mlp.up_proj.weight.data, expected, rtol=0, atol=0)
    untouched = {"model.embed_tokens", "model.norm", "lm_head", "model.layers.1.router"}
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, original[name]) == (name.rpartition(".")[0] in untouched), name


def test_apply_rounds_once_in_low_precision(rows: Tensor) -> None:
    exact, low = make_model().bfloat16().float(), make_model().bfloat16()
    result = search(exact, rows)
    awq.apply(exact, result)
    awq.apply(low, result)
    for name in awq.quantized_linear_names(low):
        assert torch.equal(low.get_submodule(name).weight, exact.get_submodule(name).weight.bfloat16()), name


def test_search_leaves_the_model_alone(rows: Tensor) -> None:
    model = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    seen: list[tuple[str, int]] = []
    results = awq.search(
        model, lambda: model(rows), [4, 3], GROUP, progress=lambda name, tokens: seen.append((name, tokens))
    )
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert seen == [("model.layers.0", rows.numel()), ("model.layers.1", rows.numel())]
    assert results[3].tokens == dict(seen)
    assert sorted(results) == [3, 4]
    # One pass for two widths finds what a pass for each finds.
    alone = search(model, rows, 3)
    assert all(torch.equal(scale, results[3].scales[name]) for name, scale in alone.scales.items())
    assert all(torch.equal(clip, results[3].clips[name]) for name, clip in alone.clips.items())


def test_hooks_are_removed_after_an_error(rows: Tensor) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="2000"):
        search(model, rows, min_tokens=2000)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_second_moments_give_the_output_error() -> None:
    torch.manual_seed(0)
    inputs, delta = torch.randn(300, 48), torch.randn(20, 48)
    moments = Moments.zeros(48)
    for chunk in inputs.view(3, 100, 48):
        moments.add(chunk.view(5, 20, 48))
    assert moments.tokens == 300
    torch.testing.assert_close(moments.abs_sum, inputs.abs().sum(0))
    expected = (inputs @ delta.T).square().sum()
    torch.testing.assert_close(output_error(delta, moments.gram), expected, rtol=1e-5, atol=0)


class Routed(nn.Module):
    """A decoder layer's forward that runs it on some tokens alone, in chunks of shape `(1, n, hidden)`."""

    def __init__(self, layer: nn.Module, chosen: Tensor, chunks: int) -> None:
        super().__init__()
        self.inner, self.chosen, self.chunks = layer.forward, chosen, chunks

    def forward(self, hidden: Tensor, **kwargs: object) -> Tensor:
        output = hidden.clone()
        for part in self.chosen.chunk(self.chunks) if len(self.chosen) else ():
            cos, sin = (table[:, : len(part)] for table in kwargs["position_embeddings"])  # type: ignore[index]
            flat = hidden.flatten(0, 1)[part][None]
            output.view(-1, hidden.shape[-1])[part] = self.inner(flat, position_embeddings=(cos, sin))[0]
        return output


def route(model: LlamaForCausalLM, chosen: Tensor, chunks: int) -> None:
    layer = model.model.layers[1]
    layer.forward = Routed(layer, chosen, chunks).forward


def test_salience_is_measured_on_executing_tokens(rows: Tensor) -> None:
    model = make_model()
    chosen = torch.randperm(rows.numel())[:48]
    inputs: list[Tensor] = []
    model.model.layers[0].register_forward_hook(lambda layer, args, output: inputs.append(output))
    route(model, chosen, chunks=3)
    result = search(model, rows)
    assert result.tokens == {"model.layers.0": rows.numel(), "model.layers.1": 48}

    # The scales of q, k and v are those of the chosen tokens' normalised states alone.
    layer = model.model.layers[1]
    with torch.no_grad():
        normed = layer.input_layernorm(inputs[0].flatten(0, 1)[chosen])
        moments = Moments.zeros(64)
        moments.add(normed)
        attention = layer.self_attn
        weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        expected = awq.search_scale(weight, moments, 4, GROUP)
    torch.testing.assert_close(result.scales["model.layers.1.input_layernorm"], expected, rtol=1e-4, atol=0)
    everyone = search(make_model(), rows).scales["model.layers.1.input_layernorm"]
    assert not torch.allclose(everyone, expected, rtol=1e-3)


@pytest.mark.parametrize("executing", [0, 5])
def test_too_few_tokens_name_the_layer(executing: int, rows: Tensor) -> None:
    model = make_model()
    route(model, torch.arange(executing), chunks=1)
    with pytest.raises(
        ValueError, match=rf"model\.layers\.1\.self_attn\.q_proj saw {executing} .* more rows"
    ):
        search(model, rows)


def test_a_layer_that_never_ran_is_named(rows: Tensor) -> None:
    model = make_model()
    stop = model.model.layers[0]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj saw 0 "):
        awq.search(
            model, lambda: stop(torch.randn(4, 16, 64), position_embeddings=angles(model, 16)), [4], GROUP
        )


def angles(model: LlamaForCausalLM, length: int) -> tuple[Tensor, Tensor]:
    return model.model.rotary_emb(torch.zeros(1), torch.arange(length)[None])


def test_two_model_calls_are_refused(rows: Tensor) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"model\.layers\.0 ran twice"):
        awq.search(model, lambda: (model(rows), model(rows)), [4], GROUP)


def test_training_mode_is_refused(rows: Tensor) -> None:
    with pytest.raises(ValueError, match="training mode"):
        search(make_model().train(), rows)


def test_indivisible_width_is_refused_before_any_compute() -> None:
    def forward() -> None:
        pytest.fail("the model ran")

    with pytest.raises(ValueError, match=r"width 64 of model\.layers\.0\.self_attn\.q_proj"):
        awq.search(make_model(), forward, [4], 48)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_name_the_linear(bad: float, rows: Tensor) -> None:
    model = make_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = bad
    with pytest.raises(ValueError, match=r"weights of model\.layers\.1\.mlp\.up_proj have NaN or infinity"):
        search(model, rows)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_activations_name_the_linear(bad: float, rows: Tensor) -> None:
    model = make_model()
    model.model.layers[1].post_attention_layernorm.weight.data[7] = bad
    with pytest.raises(ValueError, match=r"activations into model\.layers\.1\.mlp\.gate_proj have NaN"):
        search(model, rows)


def test_a_search_without_a_finite_error_names_the_layer(rows: Tensor) -> None:
    model = make_model()
    attention = model.model.layers[1].self_attn
    attention.q_proj.weight.data.zero_()  # the scores stay finite, the error of k is about 1e60
    attention.k_proj.weight.data.mul_(1e30)
    with pytest.raises(ValueError, match=r"model\.layers\.1, .*k_proj.*, 4 bits: no AWQ scale has a finite"):
        search(model, rows)


def test_models_of_another_family_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has no model\.layers"):
        awq.quantized_linear_names(nn.Linear(2, 2))
    model = make_model()
    model.model.layers[1].mlp.gate_proj = nn.Sequential(model.model.layers[1].mlp.gate_proj)
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.gate_proj must be an nn\.Linear, is a Seq.*merged"
    ):
        awq.quantized_linear_names(model)


def test_seven_linears_a_layer() -> None:
    names = awq.quantized_linear_names(make_model())
    assert len(names) == len(set(names)) == 14
    assert names[0] == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_callers_mode_does_not_reach_the_search(mode: Callable, rows: Tensor) -> None:
    model = make_model()

    def forward() -> None:
        with mode():
            model(rows)

    result = awq.search(model, forward, [4], GROUP)[4]
    assert all(scale.dtype == torch.float32 and not scale.is_inference() for scale in result.scales.values())
    # The first linears read what the norm gives in float32 in either mode: the sums, too, must be float32 ones.
    name = "model.layers.0.self_attn.q_proj"
    assert result.errors[name] == pytest.approx(search(model, rows).errors[name], rel=1e-5)
    awq.apply(model, result)


def test_save_and_load(tmp_path: Path, rows: Tensor) -> None:
    result = search(make_model(), rows)
    path = tmp_path / "awq-4bit.safetensors"
    result.save(path)
    loaded = AWQSearch.load(path)
    assert (loaded.bits, loaded.group_size) == (4, GROUP)
    assert (loaded.errors, loaded.tokens) == (result.errors, result.tokens)
    for kind in ("scales", "clips"):
        ours, theirs = getattr(result, kind), getattr(loaded, kind)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_load_refuses_what_is_not_a_result(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        AWQSearch.load(tmp_path / "nothing.safetensors")
    (tmp_path / "text").write_text("not tensors, but long enough to be read as a header of some length")
    with pytest.raises(ValueError, match="not a safetensors file"):
        AWQSearch.load(tmp_path / "text")
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="not an AWQ search result"):
        AWQSearch.load(tmp_path / "other")


def test_a_result_of_another_model_is_refused(rows: Tensor) -> None:
    result = search(make_model(kv_heads=4), rows)
    other = make_model(kv_heads=2)
    before = other.model.layers[0].mlp.up_proj.weight.clone()
    for change in (awq.apply, awq.apply_scales):
        with pytest.raises(ValueError, match="another model"):
            change(other, result)
    assert torch.equal(other.model.layers[0].mlp.up_proj.weight, before)
