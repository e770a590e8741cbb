"""Both layouts: nothing is lost, nothing is wasted, and the places of codes are those worked out by hand."""

import pytest
import torch
from torch import Tensor

from qtale_lightning.quantization.packing import pack_gemm, pack_tight, unpack_gemm, unpack_tight


def random_codes(bits: int, *shape: int) -> Tensor:
    return torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(bits))


@pytest.mark.parametrize("shape", [(8,), (16, 64), (3, 2, 24)])
@pytest.mark.parametrize("bits", range(2, 9))
def test_tight_is_undone_and_wastes_nothing(bits: int, shape: tuple[int, ...]) -> None:
    codes = random_codes(bits, *shape)
    packed = pack_tight(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert packed.shape == (*shape[:-1], shape[-1] * bits // 8)
    unpacked = unpack_tight(packed, bits)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked.long(), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_tight_takes_the_extreme_codes(bits: int) -> None:
    """All bits set, and the highest code alone at each place: no carry, no sign."""
    highest = 2**bits - 1
    assert torch.equal(
        pack_tight(torch.full((8,), highest), bits), torch.full((bits,), 255, dtype=torch.uint8)
    )
    for codes in torch.eye(8, dtype=torch.long) * highest:
        assert torch.equal(unpack_tight(pack_tight(codes, bits), bits).long(), codes)


def test_three_bits_by_hand() -> None:
    """Eight codes, the last one first in writing: 111 110 101 100 011 010 001 000, cut into bytes from the right."""
    packed = pack_tight(torch.arange(8.0), 3)  # as `quantize` gives them: whole numbers in float32
    assert packed.tolist() == [0b10_001_000, 0b1_100_011_0, 0b111_110_10]
    assert unpack_tight(packed, 3).tolist() == list(range(8))


def test_eight_bits_are_bytes() -> None:
    codes = random_codes(8, 4, 16)
    assert torch.equal(pack_tight(codes, 8), codes.to(torch.uint8))


@pytest.mark.parametrize("width", [1, 7, 12])
def test_tight_refuses_what_leaves_a_gap(width: int) -> None:
    with pytest.raises(ValueError, match=rf"{width} codes a row .* multiple of 8"):
        pack_tight(torch.zeros(2, width), 3)


@pytest.mark.parametrize("shape", [(8, 1), (64, 32), (24, 5)])
def test_gemm_is_undone(shape: tuple[int, int]) -> None:
    codes = random_codes(4, *shape)
    packed = pack_gemm(codes.float())
    assert (packed.dtype, packed.shape) == (torch.int32, (shape[1], shape[0] // 8))
    unpacked = unpack_gemm(packed)
    assert (unpacked.dtype, unpacked.is_contiguous()) == (torch.uint8, True)
    assert torch.equal(unpacked.long(), codes)


def test_gemm_by_hand() -> None:
    """Outputs 0 2 4 6 1 3 5 7 from the lowest bits up; the last one's highest bit is the int32's sign."""
    assert pack_gemm(torch.arange(8)[:, None]).item() == 0x75316420
    assert pack_gemm(torch.arange(8, 16)[:, None]).item() == 0xFDB9ECA8 - 2**32
    assert pack_gemm(torch.full((8, 1), 15)).item() == -1


def test_gemm_refuses_a_part_of_an_int32() -> None:
    with pytest.raises(ValueError, match="multiple of 8 outputs, not 12"):
        pack_gemm(torch.zeros(12, 32))
