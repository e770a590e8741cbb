"""The engine `native` against AutoAWQ's own functions, in float32, on the same layer and inputs.

At most 512 tokens, so that AutoAWQ's subsample of the tokens in its clip search takes all of them.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qtale_lightning.quantization import awq
from qtale_lightning.quantization.awq import Moments, output_error
from qtale_lightning.quantization.rtn import fake_quantize

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

GROUP = 32
TOKENS = 512


def autoawq(bits: int) -> Any:
    """AutoAWQ's quantizer without its constructor, which would load a calibration set."""
    from awq.quantize.quantizer import AwqQuantizer

    quantizer = object.__new__(AwqQuantizer)
    quantizer.w_bit, quantizer.group_size, quantizer.zero_point = bits, GROUP, True
    quantizer.duo_scaling = True
    quantizer.n_parallel_calib_samples = None
    quantizer.max_chunk_memory = 1024**3
    return quantizer


def with_copied_state(linear: nn.Linear) -> nn.Linear:
    """Makes AutoAWQ's backup of the weights a copy, as its `.cpu()` does for weights on another device.

    On CPU weights, AutoAWQ 0.2.9 backs up aliases: all candidates but the first are then tried on weights
    that the first one scaled, and the search leaves the weights so.
    """
    linear.register_state_dict_post_hook(
        lambda module, state, prefix, metadata: state.update({key: w.clone() for key, w in state.items()})
    )
    return linear


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


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_bit_for_bit(bits: int) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(64, 128) * torch.logspace(-6, 1, 64)[:, None]
    weight[0], weight[1], weight[2] = 0.0, weight[1].abs() + 1, -weight[2].abs() - 1
    assert torch.equal(fake_quantize(weight, bits, GROUP), autoawq(bits).pseudo_quantize_tensor(weight)[0])


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.no_grad()
def test_scales_of_a_single_linear(bits: int, seed: int) -> None:
    """o and down: the objectives are the same, so is the choice."""
    torch.manual_seed(seed)
    inputs = loud_inputs(128, seed)
    block = nn.ModuleDict({"up_proj": nn.Linear(64, 128), "down_proj": nn.Linear(128, 64, bias=False)})
    down = with_copied_state(block["down_proj"])
    ours = awq.search_scale(down.weight.clone(), moments_of(inputs), bits, GROUP)
    before = down.weight.clone()
    _, _, theirs = autoawq(bits)._search_best_scale(block, block["up_proj"], [down], inputs[None])
    assert torch.equal(down.weight, before)
    # The same ratio of 20 (neighbours differ by 5% and more); the rest is the order of the mean's additions.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@torch.no_grad()
def test_objective_of_a_single_linear(bits: int) -> None:
    torch.manual_seed(0)
    inputs, weight = loud_inputs(128, 3), torch.randn(64, 128)
    delta = autoawq(bits).pseudo_quantize_tensor(weight)[0] - weight
    theirs = autoawq(bits)._compute_loss(inputs @ weight.T, inputs @ (weight + delta).T, inputs.device)
    ours = output_error(delta, moments_of(inputs).gram).item() / (TOKENS * 64)
    assert ours == pytest.approx(theirs, rel=1e-4)  # float32 sums of 3e4 squares, in another order


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_clips(bits: int, seed: int) -> None:
    torch.manual_seed(seed)
    inputs, weight = loud_inputs(128, seed), torch.randn(128, 128)
    moments = moments_of(inputs)
    ours = awq.search_clip(weight, moments.gram, bits, GROUP)
    theirs = autoawq(bits)._compute_best_clip(weight, inputs)
    # Of 512 groups, at most 1 in 200 may differ: where two of the ten steps err alike to within rounding, the
    # order of additions decides. There the errors achieved must agree.
    differing = ~torch.isclose(ours, theirs.squeeze(-1), rtol=1e-6)
    assert differing.float().mean() <= 0.005
    errors = [group_errors(weight, limit, inputs, bits)[differing] for limit in (ours, theirs.squeeze(-1))]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-4, atol=0)


def group_errors(weight: Tensor, limit: Tensor, inputs: Tensor, bits: int) -> Tensor:
    """Squared error of every output's part from each group, shape `(out, n_groups)`, in float64."""
    groups = weight.unflatten(-1, (-1, GROUP))
    clipped = fake_quantize(groups.clamp(-limit[..., None], limit[..., None]), bits, GROUP)
    delta = (clipped - groups).double()
    return torch.einsum("tng,ong->ton", inputs.double().unflatten(-1, (-1, GROUP)), delta).square().sum(0)


@pytest.mark.parametrize("bits", [3, 4])
@torch.no_grad()
def test_a_decoder_layer(bits: int) -> None:
    """A whole layer: o, down and their clips as AutoAWQ chooses them, from its scaled weights and inputs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=96
    )
    model = LlamaForCausalLM(config).eval()
    layer = model.model.layers[0]
    for parameter in layer.parameters():
        parameter.normal_(std=0.3)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight.fill_(1.0)[::16] = 15.0
    rows = torch.randint(96, (16, TOKENS // 16))
    inputs: dict[str, Tensor] = {}
    for name, linear in layer.named_modules():
        if isinstance(linear, nn.Linear):
            linear.register_forward_pre_hook(
                lambda _, args, name=name: inputs.update({name: args[0].clone()})
            )
    result = awq.search(model, lambda: model(rows), [bits], GROUP)[bits]

    # [STEP 1] The scales of the mappings with a single linear.
    reference = autoawq(bits)
    for previous, name in (("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")):
        linears = [with_copied_state(layer.get_submodule(name))]
        _, _, scale = reference._search_best_scale(
            layer, layer.get_submodule(previous), linears, inputs[name]
        )
        torch.testing.assert_close(result.scales[f"model.layers.0.{previous}"], scale, rtol=1e-4, atol=0)

    # [STEP 2] The clips, given the same scales.
    awq.apply_scales(model, result)
    model(rows)
    for name in ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        clip = reference._compute_best_clip(layer.get_submodule(name).weight, inputs[name])
        same = torch.isclose(result.clips[f"model.layers.0.{name}"], clip.squeeze(-1), rtol=1e-4)
        assert same.float().mean() >= 0.98, name  # ties, and weights rounded once more by `apply_scales`
    skipped = {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"}
    assert skipped.isdisjoint(result.clips)
