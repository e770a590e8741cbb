"""Triton's products against PyTorch's: in its interpreter where there is no GPU, which rounds bfloat16 towards zero."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear as dense

pytest.importorskip("triton")

from qtale_lightning.cuda.linear import Weight, dequantize, from_codes, gated_linear, linear
from qtale_lightning.quantization.rtn import Quantized, Scheme, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INPUTS, EPS = 96, 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Hugging Face's."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def int4(outputs: int, bias: Tensor | None = None) -> tuple[Weight, Tensor]:
    """A weight for the kernels, and the levels that it stands for."""
    codes, scales, zeros = quantize(random(outputs, INPUTS, seed=outputs), Scheme(4, 32))
    stored = Quantized(codes, scales.half().float(), zeros)
    return from_codes(*stored, bias), stored.dequantize()


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Sums in another order, and results that are rounded once more or to the other side."""
    epsilon = torch.finfo(found.dtype).eps
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=2 * epsilon, atol=4 * epsilon * largest)


def project(
    x: Tensor, weights: Sequence[Weight], gates: Tensor, norm: Tensor | None, start: Tensor | None = None
) -> Tensor:
    width = sum(len(weight.values) for weight in weights)
    y = x.new_full((len(x), width), 7.0) if start is None else start.clone()
    linear(x, weights, y, gates, norm, EPS, residual=start is not None)
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_weights_side_by_side(batch: int, dtype: torch.dtype) -> None:
    """Queries, keys and values, behind a norm, with biases; widths that no block divides."""
    x, norm = random(batch, INPUTS, dtype=dtype), random(INPUTS, dtype=dtype, seed=1)
    weights = [
        Weight(random(n, INPUTS, dtype=dtype, seed=n), bias=random(n, dtype=dtype)) for n in (136, 40, 32)
    ]
    gates = torch.ones(batch, dtype=torch.int32, device=DEVICE)
    normed = rms_norm(x, norm)
    expected = torch.cat([dense(normed, weight.values, weight.bias) for weight in weights], 1)
    assert_close(project(x, weights, gates, norm), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_int4_joins_the_residual_stream(batch: int, dtype: torch.dtype) -> None:
    x, (weight, levels), start = (
        random(batch, INPUTS, dtype=dtype),
        int4(40),
        random(batch, 40, dtype=dtype, seed=2),
    )
    gates = torch.ones(batch, dtype=torch.int32, device=DEVICE)
    found = project(x, [weight], gates, None, start)
    assert_close(found, start + dense(x.float(), levels).to(dtype))


def test_weights_of_two_forms() -> None:
    x, (packed, levels), plain = random(2, INPUTS), int4(40), random(24, INPUTS, seed=3)
    gates = torch.ones(2, dtype=torch.int32, device=DEVICE)
    found = project(x, [Weight(plain), packed], gates, None)
    assert_close(found, torch.cat([dense(x, plain), dense(x, levels)], 1))


@pytest.mark.parametrize("bits", [16, 4])
def test_closed_gates_read_no_weights_and_leave_the_stream(bits: int) -> None:
    """NaN would show whatever a weight was part of."""
    x, start = random(1, INPUTS), random(1, 40, seed=2)
    weight = int4(40)[0] if bits == 4 else Weight(random(40, INPUTS))
    values = weight.values if weight.scales is None else weight.scales
    values.fill_(torch.nan)
    closed = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    assert torch.equal(project(x, [weight], closed, None, start), start)
    assert project(x, [weight], 1 - closed, None, start).isnan().all()


def test_sequences_of_a_batch_have_gates_of_their_own() -> None:
    x, start, weight = random(3, INPUTS), random(3, 40, seed=2), Weight(random(40, INPUTS, seed=3))
    gates = torch.tensor([0, 1, 0], dtype=torch.int32, device=DEVICE)
    found = project(x, [weight], gates, None, start)
    assert torch.equal(found[::2], start[::2])
    assert_close(found[1], start[1] + dense(x[1], weight.values))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_gated_mlp(batch: int, dtype: torch.dtype) -> None:
    x, norm = 0.3 * random(batch, INPUTS, dtype=dtype), random(INPUTS, dtype=dtype, seed=1)
    gate, (up, levels) = Weight(random(136, INPUTS, dtype=dtype, seed=2)), int4(136)
    y = x.new_zeros(batch, 136)
    gated_linear(x, gate, up, y, torch.ones(batch, dtype=torch.int32, device=DEVICE), norm, EPS)
    normed = rms_norm(x, norm)
    expected = torch.nn.functional.silu(dense(normed, gate.values)) * dense(normed.float(), levels).to(dtype)
    assert_close(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized(dtype: torch.dtype) -> None:
    weight, levels = int4(5)
    found = torch.empty(5, INPUTS, dtype=dtype, device=DEVICE)
    dequantize(weight, found)
    assert_close(found, levels.to(dtype))
