"""Tokens in 8 bits and a head in fewer: what is computed, and that nothing else changes."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qtale_lightning import cpu
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.int4 import round_tokens
from qtale_lightning.quantization.int4_cpu import Int4Strips
from qtale_lightning.quantization.kernels import Dequantize
from qtale_lightning.quantization.lighter import HEAD_GROUP_SIZE, lighten
from qtale_lightning.quantization.linear import QuantizedLinear
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import round_to_nearest
from qtale_lightning.quantization.rtn import Quantized, Scheme, fake_quantize, quantize

IDS = torch.arange(24).view(2, 12)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def model(
    hidden: int = 64, quantized: bool = True, tied: bool = True, vocabulary: int = 96
) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    made = LlamaForCausalLM(config).eval()
    if quantized:
        quantize_model(made, round_to_nearest(uniform(linear_shapes(made), 4, {}), 32))
    return made


def test_tokens_are_rounded_in_blocks() -> None:
    x = torch.cat([torch.linspace(-3, 3, 32), torch.zeros(32), 1e-3 * torch.linspace(0, 1, 32)])
    rounded = round_tokens(x)
    for block in range(3):
        one = slice(32 * block, 32 * block + 32)
        step = x[one].abs().max() / 127
        assert (rounded[one] - x[one]).abs().max() <= 0.5001 * step
        assert len(rounded[one].unique()) > 16 or step == 0
    assert torch.equal(round_tokens(x.double() * 0), torch.zeros(96, dtype=torch.float64))


def test_tokens_in_8_bits(operations: bool) -> None:
    """The same model, by integers and by rounding the tokens of every quantized product."""
    light, other = model(), model()
    lighten(light, activation_bits=8)
    for part in other.modules():
        if isinstance(part, QuantizedLinear):
            part.register_forward_pre_hook(lambda _, inputs: (round_tokens(inputs[0]),))
    expected = other(IDS).logits
    # Float32 noise takes a value across a rounding boundary here and there, a 254th of its block's largest.
    error = (light(IDS).logits - expected).norm() / expected.norm()
    assert error < 2e-3
    assert (model()(IDS).logits - expected).norm() / expected.norm() > 2 * error
    kernel = light.get_submodule("model.layers.0.mlp.up_proj").kernel
    assert isinstance(kernel, Int4Strips) == operations


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_head_alone_is_rounded(bits: int, tied: bool, operations: bool) -> None:
    light, plain = model(quantized=False, tied=tied), model(quantized=False, tied=tied)
    embeddings = plain.get_input_embeddings().weight.clone()
    lighten(light, head_bits=bits)
    rounded = fake_quantize(plain.lm_head.weight.detach(), Scheme(bits, HEAD_GROUP_SIZE))
    states = plain.model(IDS).last_hidden_state
    torch.testing.assert_close(
        light(IDS).logits, states @ rounded.T, rtol=1e-3, atol=1e-3
    )  # scales in float16
    assert torch.equal(light.get_input_embeddings().weight, embeddings)
    assert light.generate(IDS, max_new_tokens=4, do_sample=False).shape == (2, 16)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_head_of_any_number_of_outputs(bits: int, operations: bool) -> None:
    """The vocabulary's 97 tokens get the logits of those of the same weights among 112, and no others get any."""
    light, plain = (model(quantized=False, tied=False, vocabulary=97) for _ in range(2))
    plain.lm_head = nn.Linear(64, 97)  # with a bias
    light.lm_head = nn.Linear(64, 97)
    light.lm_head.load_state_dict(plain.lm_head.state_dict())
    lighten(light, head_bits=bits)
    head, x = light.lm_head, torch.randn(2, 3, 64)
    rounded = fake_quantize(plain.lm_head.weight.detach(), Scheme(bits, HEAD_GROUP_SIZE))
    torch.testing.assert_close(head(x), x @ rounded.T + plain.lm_head.bias, rtol=1e-3, atol=1e-3)
    assert light(IDS).logits.shape == (2, 12, 97)
    assert isinstance(head.kernel, Int4Strips) == operations


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_wide_codes_in_planes(bits: int, symmetric: bool) -> None:
    if not cpu.available():
        pytest.skip("our CPU operations weren't built here")
    torch.manual_seed(0)
    codes, scales, zeros = quantize(torch.randn(48, 96) + 0.2, Scheme(bits, 32, symmetric))
    weight = Quantized(codes, scales.half().float(), zeros)
    kernel, x = Int4Strips(weight), torch.randn(40, 96)
    assert kernel.planes == 2
    expected = Dequantize(weight)(x)
    torch.testing.assert_close(kernel(x), expected, rtol=0, atol=3e-6 * float(expected.abs().max()))
    torch.testing.assert_close(kernel.by_blocks(x), expected, rtol=0, atol=3e-6 * float(expected.abs().max()))
    expected = Dequantize(weight)(round_tokens(x))
    torch.testing.assert_close(
        kernel.by_rounded(x), expected, rtol=0, atol=3e-6 * float(expected.abs().max())
    )


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="this model has none"):
        lighten(model(quantized=False), activation_bits=8)
    odd = nn.Module()
    odd.lm_head = nn.Linear(48, 8)
    with pytest.raises(ValueError, match="lm_head has 48 inputs"):
        lighten(odd, head_bits=8)
    once = model()
    lighten(once, head_bits=8)
    with pytest.raises(ValueError, match="the head is quantized already"):
        lighten(once, head_bits=4)
