"""The kernels against the plain reference `Dequantize` in float32, over the shapes of every preset.

Errors are relative to a token's norm. float32: summation noise alone; 1.5e-6 was measured, where a zero point that is
off by one in a single group of 14336 inputs gives 1.6e-2. bfloat16: scales, offsets, levels and outputs are each
rounded by 2⁻⁹ at most, which comes to 2.5e-3 on the mean of tokens, 7.2e-3 on the worst one. float16: 3.7e-4.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qtale_lightning import cpu
from qtale_lightning.architectures import known_models
from qtale_lightning.evaluation.cost import linear_shapes
from qtale_lightning.models.sources import base_config
from qtale_lightning.quantization import int4_cpu, planes
from qtale_lightning.quantization.int4_cpu import CROSSOVER_TOKENS, Int4CPU, Int4Strips, kernel_block
from qtale_lightning.quantization.int4_cuda import Int4CUDA
from qtale_lightning.quantization.kernels import Dequantize, Kernel, choose_kernel, kernels_for
from qtale_lightning.quantization.nested import narrowed, of_highest
from qtale_lightning.quantization.planes import OUR_CROSSOVER_TOKENS, PlaneStrips
from qtale_lightning.quantization.rtn import Quantized, Scheme, fake_quantize, quantize
from tests.tolerance import close

KernelOf = Callable[[Quantized], Kernel]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
CROSSOVERS = (OUR_CROSSOVER_TOKENS, CROSSOVER_TOKENS)
TOKENS = (1, 2, 3, 5, 8, 13, *(tokens for end in CROSSOVERS for tokens in (end - 1, end)), 100)
# Outputs are independent of each other: 256 of them are enough.
ALL_SHAPES = {shape for name in known_models() for shape in linear_shapes(base_config(name)).values()}
SHAPES = sorted({(min(outputs, 256), inputs) for outputs, inputs in ALL_SHAPES})
CASES = [(*shape, group) for shape in SHAPES for group in (32, 64, 128) if shape[1] % group == 0]

needs_kernel = pytest.mark.skipif(
    kernel_block() is None, reason="PyTorch has no int4 kernel of a known layout here"
)
needs_ours = pytest.mark.skipif(not cpu.available(), reason="our CPU operations weren't built here")
on_the_cpu = pytest.mark.parametrize(
    "kernel_of", [pytest.param(Int4Strips, marks=needs_ours), pytest.param(Int4CPU, marks=needs_kernel)]
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_weight(outputs: int, inputs: int, scheme: Scheme, device: str = "cpu") -> Quantized:
    """Rows whose means differ, so that zero points take every value; scales as stored, in float16."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) + torch.linspace(-1.5, 1.5, outputs)[:, None]
    codes, scales, zeros = quantize(weight.to(device) * 0.02, scheme)
    return Quantized(codes, scales.half().float(), zeros)


def make_tokens(inputs: int, device: str = "cpu") -> Tensor:
    """More than any call takes; values that bfloat16 holds, so that every dtype gets the same."""
    tokens = torch.randn(max(TOKENS), inputs, generator=torch.Generator().manual_seed(1))
    return tokens.bfloat16().float().to(device)


def check(kernel: Kernel, weight: Quantized, *dtypes: torch.dtype) -> None:
    """Compares at all numbers of tokens, by each token's own norm."""
    x = make_tokens(weight.codes[0].numel(), weight.codes.device.type)
    expected = Dequantize(weight)(x)
    for dtype in dtypes:
        for tokens in TOKENS:
            output = kernel(x[:tokens].to(dtype))
            assert (output.dtype, output.shape) == (dtype, (tokens, len(weight.codes)))
            error = (output.float() - expected[:tokens]).norm(dim=-1) / expected[:tokens].norm(dim=-1)
            assert error.max() <= TOLERANCE[dtype], (dtype, tokens, error.max())


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_reference_is_the_definition(bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    weight, scheme = torch.randn(24, 64), Scheme(bits, 16, symmetric)
    x = torch.randn(5, 64)
    output = Dequantize(quantize(weight, scheme))(x)
    close(output, x @ fake_quantize(weight, scheme).T, 64)


# Both for the CPU ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@on_the_cpu
@pytest.mark.parametrize(("outputs", "inputs", "group"), CASES)
def test_the_presets_shapes(kernel_of: KernelOf, outputs: int, inputs: int, group: int) -> None:
    weight = make_weight(outputs, inputs, Scheme(4, group))
    check(kernel_of(weight), weight, torch.float32, torch.bfloat16)


@on_the_cpu
@pytest.mark.parametrize("sign", [1, -1])
def test_groups_of_one_sign(kernel_of: KernelOf, sign: int) -> None:
    """Zero points at the ends, where the kernel's offsets, and so their rounding, are largest."""
    torch.manual_seed(0)
    codes, scales, zeros = quantize(sign * torch.rand(64, 128), Scheme(4, 32))
    weight = Quantized(codes, scales.half().float(), zeros)
    assert weight.zeros.unique().tolist() == [0 if sign > 0 else 15]
    check(kernel_of(weight), weight, torch.float32, torch.bfloat16)


@on_the_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 64])
def test_tokens_need_not_be_contiguous(kernel_of: KernelOf, tokens: int, dtype: torch.dtype) -> None:
    weight = make_weight(64, 128, Scheme(4, 32))
    x = make_tokens(128)[:tokens].to(dtype)
    for other in (x.T.contiguous().T, torch.stack([x, x], dim=-1)[..., 0], x.repeat(1, 2)[:, :128]):
        assert not other.is_contiguous()
        torch.testing.assert_close(kernel_of(weight)(other), kernel_of(weight)(x), rtol=2e-2, atol=1e-5)


@on_the_cpu
def test_a_call_leaves_the_tokens_and_the_weight(kernel_of: KernelOf) -> None:
    """Blocks are dequantized in place: not in the weight's own memory."""
    kernel, x = kernel_of(make_weight(64, 128, Scheme(4, 32))), make_tokens(128)
    for tokens, dtype in ((1, torch.bfloat16), (100, torch.bfloat16), (100, torch.float32)):
        once = kernel(given := x[:tokens].to(dtype))
        assert torch.equal(kernel(given), once)
        assert torch.equal(given.float(), x[:tokens])


# Ours for the CPU ----------------------------------------------------------------------------------------------------


@needs_ours
@pytest.mark.parametrize("group", [16, 32, 48, 128])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_all_widths_by_ours(bits: int, symmetric: bool, group: int) -> None:
    """An odd number of strips, too: the last one is multiplied alone."""
    weight = make_weight(208, 384, Scheme(bits, group, symmetric))
    check(Int4Strips(weight), weight, torch.float32, torch.bfloat16, torch.float16)


@needs_ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_scales_and_zeros_are_exact_in_ours(dtype: torch.dtype) -> None:
    """Tokens that choose single inputs give back the weight's columns, rounded once."""
    weight = make_weight(80, 96, Scheme(4, 32))
    kernel, exact = Int4Strips(weight), weight.dequantize()
    one_hot = torch.eye(96, dtype=dtype)
    assert torch.equal(kernel.by_kernel(one_hot).T, exact.to(dtype))
    assert torch.equal(kernel.by_blocks(one_hot).T, exact.to(dtype))


@needs_ours
@pytest.mark.parametrize("outputs", [16, 176])
def test_outputs_in_several_blocks(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "BLOCK_OUTPUTS", 48)
    monkeypatch.setattr(cpu, "multiplies_in_tiles", lambda: True)
    weight = make_weight(outputs, 64, Scheme(4, 32))
    check(Int4Strips(weight), weight, torch.float32, torch.bfloat16)


# Planes --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_ours
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_planes_over_the_presets_shapes(outputs: int, inputs: int, bits: int) -> None:
    weight = make_weight(outputs, inputs, Scheme(bits, 128 if inputs % 128 == 0 else 32))
    check(PlaneStrips(weight), weight, torch.float32, torch.bfloat16)


@needs_ours
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_all_widths_by_planes(bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An odd number of strips, in whole and in parts, as kernels for many tokens take them."""
    weight = make_weight(208, 384, Scheme(bits, 96, symmetric))
    check(PlaneStrips(weight, bits), weight, torch.float32, torch.bfloat16, torch.float16)
    monkeypatch.setattr(planes, "BLOCK_OUTPUTS", 48)
    monkeypatch.setattr(cpu, "multiplies_in_tiles", lambda: True)
    check(PlaneStrips(weight, bits), weight, torch.bfloat16)


@needs_ours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_models_are_read_of_the_same_planes(dtype: torch.dtype) -> None:
    """Fractions of zero points are exact, too: tokens that choose single inputs give back the weight's columns."""
    weight, one_hot = make_weight(80, 96, Scheme(4, 32)), torch.eye(96, dtype=dtype)
    found = kernels_for(weight, 4, _terms(weight))
    for bits, kernel in found.items():
        assert isinstance(kernel, PlaneStrips)
        exact = narrowed(weight, 4 - bits).dequantize()
        assert torch.equal(kernel(one_hot).T, exact.to(dtype)), bits
        assert torch.equal(kernel.dequantize(0, 80, one_hot), exact.to(dtype)), bits
        assert kernel.high.data_ptr() == found[4].high.data_ptr()  # type: ignore[attr-defined]


def _terms(weight: Quantized) -> dict[int, tuple[Tensor, Tensor]]:
    """Scales and zero points of 2 and 3 bits that follow from those of 4."""
    found = {}
    for bits in (2, 3):
        scales, zeros = of_highest(weight.scales, weight.zeros, 4 - bits)
        found[bits] = scales.squeeze(-1), zeros.squeeze(-1)
    return found


def test_narrower_models_without_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)
    weight, x = make_weight(64, 128, Scheme(4, 32)), make_tokens(128)[:3]
    for bits, kernel in kernels_for(weight, 4, _terms(weight)).items():
        torch.testing.assert_close(kernel(x), x @ narrowed(weight, 4 - bits).dequantize().T)


@pytest.mark.slow
@needs_ours
def test_threads_do_not_change_ours() -> None:
    """Each computes whole outputs."""
    weight, threads = make_weight(256, 4096, Scheme(4, 128)), torch.get_num_threads()
    kernel, x = Int4Strips(weight), make_tokens(4096)[:3].bfloat16()
    alone = kernel(x)
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(kernel(x), alone)
            assert torch.equal(kernel.by_blocks(torch.eye(4096).bfloat16()).T, weight.dequantize().bfloat16())
    finally:
        torch.set_num_threads(threads)


@needs_ours
@pytest.mark.parametrize(
    ("outputs", "inputs", "group", "taken"),
    [(72, 64, 32, False), (16, 16, 16, False), (16, 32, 8, False), (16, 32, 16, True)],
)
def test_ours_take_the_shapes_that_they_say(outputs: int, inputs: int, group: int, taken: bool) -> None:
    weight = make_weight(outputs, inputs, Scheme(4, group))
    assert Int4Strips.supports(weight) == taken
    if taken:
        check(Int4Strips(weight), weight, torch.float32, torch.bfloat16)
    else:
        with pytest.raises(ValueError, match=f"{outputs} outputs"):
            Int4Strips(weight)


@needs_ours
def test_no_tokens_by_ours() -> None:
    assert Int4Strips(make_weight(64, 128, Scheme(4, 32)))(torch.ones(0, 128)).shape == (0, 64)


@needs_ours
def test_ours_refuse_tokens_of_another_width() -> None:
    kernel = Int4Strips(make_weight(16, 64, Scheme(4, 32)))
    with pytest.raises(RuntimeError, match="64 inputs"):
        kernel(torch.ones(2, 32))


# PyTorch's for the CPU -----------------------------------------------------------------------------------------------


@needs_kernel
def test_every_preset_runs_by_the_kernel() -> None:
    block = kernel_block()
    assert block is not None
    assert all(outputs % block == 0 for outputs, _ in ALL_SHAPES)


@needs_kernel
@pytest.mark.parametrize("group", [16, 32, 128])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_all_widths_that_fit(bits: int, symmetric: bool, group: int) -> None:
    """Groups of 16 are not the kernel's: blocks for any number of tokens."""
    weight = make_weight(192, 256, Scheme(bits, group, symmetric))
    check(Int4CPU(weight), weight, torch.float32, torch.bfloat16, torch.float16)


@needs_kernel
def test_the_last_step_may_be_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    block, inputs, outputs = kernel_block(), 256, 704
    assert block is not None
    step = 3
    assert (outputs // block) % step
    monkeypatch.setattr(int4_cpu, "TILE_WEIGHTS", step * inputs * block)
    weight = make_weight(outputs, inputs, Scheme(4, 128))
    check(Int4CPU(weight), weight, torch.float32, torch.bfloat16)


@needs_kernel
def test_which_path_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for few tokens in bfloat16 in groups that it takes, blocks for all else."""
    calls: dict[str, list[int]] = {"by_kernel": [], "by_blocks": []}
    for name, method in [(name, getattr(Int4CPU, name)) for name in calls]:

        def spy(self: Int4CPU, x: Tensor, name: str = name, method: Any = method) -> Any:
            calls[name].append(len(x))
            return method(self, x)

        monkeypatch.setattr(Int4CPU, name, spy)
    x = make_tokens(128)
    kernel = Int4CPU(make_weight(64, 128, Scheme(4, 32)))
    for tokens in TOKENS:
        kernel(x[:tokens].bfloat16())
    assert calls == {
        "by_kernel": [tokens for tokens in TOKENS if tokens < CROSSOVER_TOKENS],
        "by_blocks": [tokens for tokens in TOKENS if tokens >= CROSSOVER_TOKENS],
    }
    calls["by_blocks"].clear()
    kernel(x[:1])
    kernel(x[:2].half())
    Int4CPU(make_weight(64, 128, Scheme(4, 16)))(x[:3].bfloat16())
    assert calls["by_blocks"] == [1, 2, 3]


# The choice ----------------------------------------------------------------------------------------------------------


@needs_kernel
def test_the_choice_on_the_cpu_without_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)

    def chosen(outputs: int, group: int, bits: int) -> Kernel:
        return choose_kernel(make_weight(outputs, 128, Scheme(bits, group)))

    assert [chosen(64, 32, bits).name for bits in (2, 3, 4)] == ["int4 kernel or blocks"] * 3
    assert chosen(64, 16, 4).name == "int4 blocks"
    for outputs, bits in ((64, 8), (64, 5), (72, 4), (16, 4)):
        kernel = chosen(outputs, 32, bits)
        assert isinstance(kernel, Dequantize), (outputs, bits)
        check(kernel, make_weight(outputs, 128, Scheme(bits, 32)), torch.float32, torch.bfloat16)


@needs_ours
def test_the_choice_on_the_cpu() -> None:
    of_bits = {bits: make_weight(64, 128, Scheme(bits, 32)) for bits in (2, 3, 4)}
    assert [type(choose_kernel(of_bits[bits])) for bits in (2, 3, 4)] == [
        PlaneStrips,
        Int4Strips,
        Int4Strips,
    ]
    assert [type(choose_kernel(of_bits[bits], rounded=True)) for bits in (2, 3)] == [Int4Strips] * 2
    assert isinstance(
        choose_kernel(make_weight(64, 128, Scheme(3, 16))), Int4Strips
    )  # planes take groups of 32
    assert isinstance(choose_kernel(make_weight(64, 128, Scheme(8, 32))), Int4Strips)  # as two weights of 4
    assert isinstance(choose_kernel(make_weight(72, 128, Scheme(4, 32))), Dequantize)


@pytest.mark.parametrize(("outputs", "bits"), [(72, 4), (64, 8)])
def test_the_kernels_refuse_what_they_do_not_take(outputs: int, bits: int) -> None:
    weight = make_weight(outputs, 128, Scheme(bits, 32))
    with pytest.raises(ValueError, match=f"{outputs} outputs"):
        Int4CPU(weight)
    with pytest.raises(ValueError, match="CUDA int4 kernel"):
        Int4CUDA(weight)


def by_neighbours(codes: Tensor, tiles: int) -> Tensor:
    """The layout of PyTorch's plain CPU code, without vector instructions: neighbouring outputs share a byte."""
    low, high = codes.to(torch.uint8).view(-1, 16, 2, codes.shape[1]).unbind(2)
    return (high << 4 | low).transpose(1, 2).reshape(len(codes), -1)


def missing(codes: Tensor, tiles: int) -> Tensor:
    raise RuntimeError("not compiled")


@pytest.mark.parametrize("convert", [by_neighbours, missing])
def test_without_a_known_layout_the_weight_is_dequantized(
    convert: Callable[[Tensor, int], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = make_weight(64, 128, Scheme(4, 32))
    monkeypatch.setattr(cpu, "available", lambda: False)
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", convert)
    kernel_block.cache_clear()
    try:
        assert kernel_block() is None
        assert isinstance(choose_kernel(weight), Dequantize)
    finally:
        kernel_block.cache_clear()


# The GPU's kernel ----------------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize(("outputs", "inputs", "group"), CASES)
def test_the_presets_shapes_on_a_gpu(outputs: int, inputs: int, group: int) -> None:
    weight = make_weight(outputs, inputs, Scheme(4, group), "cuda")
    assert math.prod(weight.codes.shape) == outputs * inputs
    check(choose_kernel(weight), weight, torch.bfloat16)
    assert isinstance(choose_kernel(weight), Int4CUDA)


@needs_cuda
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_all_widths_on_a_gpu(bits: int, symmetric: bool) -> None:
    weight = make_weight(192, 256, Scheme(bits, 32, symmetric), "cuda")
    kernel = choose_kernel(weight)
    assert isinstance(kernel, Dequantize if bits == 8 else Int4CUDA)
    check(kernel, weight, torch.bfloat16)
