import pytest
import torch

from qtale_lightning.quantization.rtn import check_quantizable, fake_quantize, quantize


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_at_most_one_step(bits: int) -> None:
    """Half a step from rounding the weight, half from rounding the zero point at the ends of the range."""
    torch.manual_seed(0)
    weight = torch.randn(64, 32)
    weight[:, ::8].abs_()  # both signs in every group
    weight[:, 1::8].abs_().neg_()
    groups = weight.unflatten(-1, (4, 8))
    step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    error = (fake_quantize(weight, bits, 8) - weight).unflatten(-1, (4, 8)).abs()
    assert (error.amax(-1) <= step * 1.001).all()
    # Away from the ends of the range only the first half remains.
    middle = (groups - groups.mean(-1, keepdim=True)).abs().argmin(-1, keepdim=True)
    assert (error.gather(-1, middle).squeeze(-1) <= step * 0.501).all()


def test_values_by_hand() -> None:
    # Range -1..2 at 2 bits: step 1, zero point 1, levels -1, 0, 1, 2; ties round to even.
    weight = torch.tensor([[-1.0, 0.4, 0.6, 2.0], [-1.0, 0.5, 1.5, 2.0]])
    codes, scales, zeros = quantize(weight, bits=2, group_size=4)
    assert codes.squeeze(1).tolist() == [[0, 1, 2, 3], [0, 1, 3, 3]]
    assert scales.flatten().tolist() == [1, 1]
    assert zeros.flatten().tolist() == [1, 1]
    assert fake_quantize(weight, 2, 4).tolist() == [[-1, 0, 1, 2], [-1, 0, 2, 2]]


def test_a_constant_group_stays_finite() -> None:
    assert torch.equal(fake_quantize(torch.zeros(2, 8), 4, 8), torch.zeros(2, 8))
    assert fake_quantize(torch.full((2, 8), 0.3), 4, 8).isfinite().all()


def test_leading_dimensions_are_a_batch() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 5, 16)
    one_by_one = torch.stack([fake_quantize(w, 3, 8) for w in weight])
    assert torch.equal(fake_quantize(weight, 3, 8), one_by_one)


def test_keeps_dtype_and_input() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 16, dtype=torch.bfloat16)
    before = weight.clone()
    rounded = fake_quantize(weight, 4, 8)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(weight, before)
    assert torch.equal(rounded, fake_quantize(weight.float(), 4, 8).bfloat16())


def test_check_names_module_and_width_and_suggests_what_fits() -> None:
    shapes = {"model.layers.0.self_attn.q_proj": (576, 576), "model.layers.0.mlp.down_proj": (576, 1536)}
    check_quantizable(shapes, bits=4, group_size=64)
    with pytest.raises(
        ValueError, match=r"128 .* width 576 of model\.layers\.0\.self_attn\.q_proj.* 64 or 32"
    ):
        check_quantizable(shapes, bits=4, group_size=128)
    with pytest.raises(ValueError, match="such as 7"):
        check_quantizable({"odd": (4, 7), "odder": (4, 21)}, bits=4, group_size=2)


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_check_refuses_bits(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must be from 2 to 8"):
        check_quantizable({}, bits, 32)


def test_check_refuses_group_size() -> None:
    with pytest.raises(ValueError, match="group_size must be positive"):
        check_quantizable({}, 4, 0)
