"""Our CPU operations against PyTorch's and Hugging Face's, by every instruction set here, in float32 and bfloat16.

Equal to the last bit where no sum is taken; float32 sums in another order: 1e-6 of their terms' size. In bfloat16 such
a sum may round to the neighbouring value, and a product with that once more: 2⁻⁶ of it at most, in fewer than one of
fifty values.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from qtale_lightning import cpu, precision
from qtale_lightning.quantization.int4_cpu import Int4Strips
from qtale_lightning.quantization.kernels import Dequantize
from qtale_lightning.quantization.rtn import Quantized, Scheme, quantize
from qtale_lightning.routing.router import Router
from tests.tolerance import close

pytestmark = pytest.mark.skipif(not cpu.available(), reason="our CPU operations weren't built here")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True, params=precision.instruction_sets())
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction set, whose operations a test calls."""
    of_one = cpu.operations(request.param)
    monkeypatch.setattr(cpu, "operations", lambda: of_one)
    return request.param


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(actual: Tensor, expected: Tensor, size: float = 1.0) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if expected.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-6 * size)
    else:
        torch.testing.assert_close(actual, expected, rtol=2**-6, atol=2e-6 * size)
        assert (actual != expected).sum() <= 0.02 * expected.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 5, 576), (1, 300, 4096), (0, 48)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(shape[-1], eps=1e-5)
    norm.weight.copy_(numbers(shape[-1], seed=1))
    norm.to(dtype)
    x = numbers(*shape, dtype=dtype) * 3
    check(cpu.rms_norm(x, norm.weight, 1e-5), norm(x), 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "of_angles"), [(1, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize(("length", "heads", "width"), [(1, 3, 64), (7, 32, 128), (200, 9, 32)])
def test_rotate(batch: int, of_angles: int, length: int, heads: int, width: int, dtype: torch.dtype) -> None:
    x = numbers(batch, length, heads, width, dtype=dtype)
    angles = numbers(of_angles, length, width, seed=1) * 3
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    assert torch.equal(cpu.rotate(x, cos, sin), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 7, 1536), (1, 300, 256)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = numbers(*shape, dtype=dtype) * 4, numbers(*shape, dtype=dtype, seed=1)
    check(cpu.swiglu(gate, up), nn.functional.silu(gate) * up)


def test_swiglu_at_the_ends() -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e30] * 2)
    for dtype in DTYPES:
        x = gate.to(dtype)
        expected = nn.functional.silu(x)
        torch.testing.assert_close(cpu.swiglu(x, torch.ones_like(x)), expected, rtol=2**-7, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "groups", "width"), [(9, 3, 64), (4, 4, 128), (8, 1, 16), (2, 2, 256)])
def test_attention_of_the_next_token(heads: int, groups: int, width: int, dtype: torch.dtype) -> None:
    """Sequences that keep different numbers of tokens, none among them, and one that has no new token."""
    rows, lengths = [0, 2, 3, 4], [5, 0, 300, 17]
    buffers = [numbers(5, groups, 320, width, dtype=dtype, seed=s) for s in (1, 2)]
    query, key, value = (
        numbers(4, n, width, dtype=dtype, seed=s) for n, s in ((heads, 3), (groups, 4), (groups, 5))
    )
    before = [buffer.clone() for buffer in buffers]
    output = cpu.attend_next(query, key, value, *buffers, rows, lengths, 0.2)
    for n, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        for buffer, old, new in zip(buffers, before, (key, value), strict=True):
            assert torch.equal(buffer[row, :, length], new[n])
            old[row, :, length] = new[n]
        keys, values = (buffer[row : row + 1, :, : length + 1].float() for buffer in before)
        expected = scaled_dot_product_attention(
            query[n][None, :, None].float(), keys, values, scale=0.2, enable_gqa=True
        )
        check(output[n], expected[0, :, 0].to(dtype), 4)
    assert all(torch.equal(buffer, old) for buffer, old in zip(buffers, before, strict=True))  # nothing else


def test_attention_of_repeated_tokens() -> None:
    """Those behind the sequences' own are the last one's again, and leave the buffers alone."""
    buffers = [numbers(3, 2, 8, 16, seed=s) for s in (1, 2)]
    query, key, value = (numbers(1, 5, heads, 16, seed=s) for heads, s in ((4, 3), (2, 4), (2, 5)))
    twice = [buffer.clone() for buffer in buffers]
    output = cpu.attend_next(query, key, value, *buffers, [0, 2], [3, 0], 0.2)
    parts = [x[:, :2].contiguous() for x in (query, key, value)]
    alone = cpu.attend_next(*parts, *twice, [0, 2], [3, 0], 0.2)
    assert output.shape == query.shape
    assert torch.equal(output, alone[:, [0, 1, 1, 1, 1]])
    assert all(torch.equal(a, b) for a, b in zip(buffers, twice, strict=True))


def test_attention_of_large_scores() -> None:
    keys = torch.full((1, 1, 4, 16), 1e18)
    query = torch.full((1, 1, 16), 1e18)
    output = cpu.attend_next(
        query, query, torch.ones(1, 1, 16), keys, torch.zeros(1, 1, 4, 16), [0], [3], 1.0
    )
    torch.testing.assert_close(output, torch.full((1, 1, 16), 0.25))


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 3, 8])
@pytest.mark.parametrize(("hidden", "width"), [(576, 128), (64, 16), (4096, 512)])
def test_route(hidden: int, width: int, count: int, dtype: torch.dtype, low: bool) -> None:
    torch.manual_seed(0)
    router = Router(hidden, width).train()  # its own path, float32
    router.norm.weight.copy_(torch.rand(width) + 0.5)
    down, bias = router.down.weight, router.down.bias
    if low:
        down, bias = down.bfloat16(), bias.bfloat16()
        router.down.weight.copy_(down)
        router.down.bias.copy_(bias)
    x = numbers(count, hidden, dtype=dtype)
    logits = cpu.route(x, down, bias, router.norm.weight, 1e-6, router.out.weight, router.out.bias)
    close(logits, router(x), hidden + width)
    wide = router.down(x.float()).to(dtype)
    rest = cpu.route_wide(wide, router.norm.weight, 1e-6, router.out.weight, router.out.bias)
    close(rest, router._logits(wide.float()), width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(16, 32, 16), (80, 96, 48), (208, 256, 128)])
def test_int4_products(outputs: int, inputs: int, group: int, dtype: torch.dtype) -> None:
    """Of every number of tokens that is multiplied at once, with odd numbers of strips, too."""
    codes, scales, zeros = quantize(numbers(outputs, inputs) + 0.3, Scheme(4, group))
    kernel = Int4Strips(Quantized(codes, scales.half().float(), zeros))
    weight = Dequantize(Quantized(codes, scales.half().float(), zeros))
    x = numbers(20, inputs, dtype=dtype, seed=1)
    for tokens in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 20):
        expected = weight(x[:tokens].float()).to(dtype)
        actual = kernel.by_kernel(x[:tokens])
        size = 8 * float(expected.abs().max()) if tokens else 1.0
        low = dtype == torch.bfloat16
        torch.testing.assert_close(
            actual, expected, rtol=2**-7 if low else 0, atol=(2e-5 if low else 1e-6) * size
        )
    one_hot, exact = torch.eye(inputs, dtype=dtype), weight.weight.dequantize().to(dtype)
    assert torch.equal(kernel.by_kernel(one_hot).T, exact)
    assert torch.equal(kernel.by_blocks(one_hot).T, exact)


def rounded_products(x: Tensor, weight: Quantized) -> Tensor:
    """The definition of products with tokens in 8 bits: sums of whole numbers, which are exact, ``(N, out)``."""
    outputs, groups, size = weight.codes.shape
    blocks = x.float().unflatten(-1, (-1, 32))  # (N, blocks, 32)
    most = blocks.abs().amax(-1)
    inverse = torch.where(most > 0, torch.full_like(most, 127) / most, 0)  # `127 / most` would round twice
    codes = (blocks * inverse.unsqueeze(-1)).round().long()
    assert codes.abs().max() <= 127
    of_weight = (weight.codes.long() - weight.zeros.long()).flatten(1).unflatten(1, (-1, 32))
    dots = torch.einsum("nbi,obi->nob", codes, of_weight)
    scales = weight.scales.expand(outputs, groups, size // 32).flatten(1)
    return (dots.double() * scales.double() * (most / 127).double().unsqueeze(1)).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(16, 32, 32), (208, 384, 64), (80, 256, 128)])
def test_products_of_tokens_in_8_bits(outputs: int, inputs: int, group: int, dtype: torch.dtype) -> None:
    codes, scales, zeros = quantize(numbers(outputs, inputs) + 0.3, Scheme(4, group))
    weight = Quantized(codes, scales.half().float(), zeros)
    kernel = Int4Strips(weight)
    x = numbers(20, inputs, dtype=dtype, seed=1) * 10.0 ** numbers(20, 1, seed=2).to(dtype)
    x[3] = 0
    x[4, 32:] = 0
    for tokens in (1, 2, 3, 4, 7, 8, 20):
        expected = rounded_products(x[:tokens], weight)
        actual = cpu.int4_linear_rounded(x[:tokens], kernel.packed, kernel.scales, kernel.zeros)
        assert actual.dtype == dtype
        size = expected.norm(dim=-1, keepdim=True)
        error = (actual.double() - expected).norm(dim=-1, keepdim=True)
        assert (error <= (2**-8 if dtype == torch.bfloat16 else 1e-6) * size).all()


def test_bfloat16_is_rounded_as_pytorch_does() -> None:
    """Every bfloat16, times one whose product needs rounding; what is denormal may become 0, as by the instruction."""
    up = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    gate = torch.full_like(up, 24.125)  # so large that silu leaves it alone
    expected, actual = (gate.float() * up.float()).bfloat16(), cpu.swiglu(gate, up)
    normal = ~(expected.abs() < torch.finfo(torch.bfloat16).tiny)  # NaN, too
    torch.testing.assert_close(actual[normal], expected[normal], rtol=0, atol=0, equal_nan=True)
    assert (actual[~normal].float() - expected[~normal].float()).abs().max() < torch.finfo(
        torch.bfloat16
    ).tiny


def test_exp() -> None:
    """Where silu shows it: y / silu(y) - 1 = exp(-y), to float32's last places."""
    x = torch.linspace(-87, 87, 2**16)
    expected = (x.double() * torch.sigmoid(x.double())).float()
    torch.testing.assert_close(cpu.swiglu(x, torch.ones_like(x)), expected, rtol=3e-7, atol=0)


def test_what_they_refuse() -> None:
    x = numbers(2, 24)
    with pytest.raises(RuntimeError, match="multiple of 16"):
        cpu.rms_norm(x, torch.ones(24), 1e-6)
    with pytest.raises(RuntimeError, match="float32 or bfloat16"):
        cpu.swiglu(torch.ones(16, dtype=torch.float16), torch.ones(16, dtype=torch.float16))
    buffers = torch.zeros(1, 1, 4, 16)
    one = torch.ones(1, 1, 16)
    for rows, lengths, reason in (
        ([0], [4], "no room"),
        ([1], [0], "no room"),
        ([0], [-1], "no room"),
        ([], [], "each of the sequences"),
        ([0, 0], [0, 1], "each of the sequences"),
        ([0], [0, 1], "each of the sequences"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            cpu.attend_next(one, one, one, buffers, buffers.clone(), rows, lengths, 1.0)


def test_when_they_are_ready() -> None:
    x = torch.ones(2)
    assert cpu.ready(x)
    assert cpu.ready(x.bfloat16(), x.bfloat16())
    assert not cpu.ready(x, x.bfloat16())
    assert not cpu.ready(x.half())
    assert not cpu.ready(x.to("meta"))
    with torch.enable_grad():
        assert not cpu.ready(x)
