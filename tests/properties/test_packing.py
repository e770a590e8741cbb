"""Packed codes come back, whatever the width and the shape; quantized values stay within half a step."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from qtale_lightning.quantization.linear import QuantizedLinear
from qtale_lightning.quantization.packing import pack_gemm, pack_tight, unpack_gemm, unpack_tight
from qtale_lightning.quantization.rtn import Scheme, quantize

widths = st.integers(2, 8)
seeds = st.integers(0, 2**16)


@given(widths, st.lists(st.integers(0, 5), max_size=2), st.integers(0, 6), seeds)
def test_tight_codes_come_back(bits: int, leading: list[int], eights: int, seed: int) -> None:
    shape = (*leading, 8 * eights)
    codes = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(seed))
    packed = pack_tight(codes, bits)
    assert packed.shape == (*leading, eights * bits)
    assert torch.equal(unpack_tight(packed, bits).long(), codes)


@given(st.integers(1, 6), st.integers(1, 40), seeds)
def test_gemm_codes_come_back(eights: int, inputs: int, seed: int) -> None:
    codes = torch.randint(16, (8 * eights, inputs), generator=torch.Generator().manual_seed(seed))
    packed = pack_gemm(codes)
    assert packed.shape == (inputs, eights)
    assert torch.equal(unpack_gemm(packed).long(), codes)


@given(widths, st.booleans(), st.sampled_from([8, 16, 32]), st.integers(1, 3), st.floats(-4, 3), seeds)
def test_a_stored_weight_is_within_half_a_step(
    bits: int, symmetric: bool, group: int, groups: int, magnitude: float, seed: int
) -> None:
    """Of a group with weights of both signs (levels always reach zero); float16 holds its scale to 2⁻¹¹."""
    values = torch.randn(16, groups, group, generator=torch.Generator().manual_seed(seed)) * 2**magnitude
    values[..., :2] = values[..., :2].abs() * torch.tensor([1, -1])
    weight = values.flatten(1)
    rounded = quantize(weight, Scheme(bits, group, symmetric))
    stored = QuantizedLinear.of(rounded, bits, "tight")
    codes, scales, zeros = stored.quantized()
    assert torch.equal(codes.float(), rounded.codes)
    assert torch.equal(zeros, rounded.zeros)
    # Half a step of rounding the weight, and half a step of rounding the zero point; codes times a scale's rounding.
    bound = scales * (1.01 + 2**bits * 2**-10)
    assert ((stored.dequantize() - weight).unflatten(-1, (groups, group)).abs() <= bound).all()
