import pytest
import torch

from qtale_lightning.quantization.rtn import Scheme, check_quantizable, fake_quantize, quantize


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_at_most_one_step(bits: int) -> None:
    """Half a step from rounding the weight, half from rounding the zero point at the ends of the range."""
    torch.manual_seed(0)
    weight = torch.randn(64, 32)
    weight[:, ::8].abs_()  # both signs in every group
    weight[:, 1::8].abs_().neg_()
    groups = weight.unflatten(-1, (4, 8))
    step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    error = (fake_quantize(weight, Scheme(bits, 8)) - weight).unflatten(-1, (4, 8)).abs()
    assert (error.amax(-1) <= step * 1.001).all()
    # Away from the ends of the range only the first half remains.
    middle = (groups - groups.mean(-1, keepdim=True)).abs().argmin(-1, keepdim=True)
    assert (error.gather(-1, middle).squeeze(-1) <= step * 0.501).all()


def test_values_by_hand() -> None:
    # Range -1..2 at 2 bits: step 1, zero point 1, levels -1, 0, 1, 2; ties round to even.
    weight = torch.tensor([[-1.0, 0.4, 0.6, 2.0], [-1.0, 0.5, 1.5, 2.0]])
    codes, scales, zeros = quantize(weight, Scheme(bits=2, group_size=4))
    assert codes.squeeze(1).tolist() == [[0, 1, 2, 3], [0, 1, 3, 3]]
    assert scales.flatten().tolist() == [1, 1]
    assert zeros.flatten().tolist() == [1, 1]
    assert fake_quantize(weight, Scheme(2, 4)).tolist() == [[-1, 0, 1, 2], [-1, 0, 2, 2]]


def test_symmetric_values_by_hand() -> None:
    # At 3 bits the largest magnitude, 6 and -3, becomes 3 steps: steps of 2 and 1, around the code 4.
    weight = torch.tensor([[6.0, -1.8, 0.9, 3.5], [-3.0, 0.4, 0.6, 2.0]])
    codes, scales, zeros = quantize(weight, Scheme(bits=3, group_size=4, symmetric=True))
    assert codes.squeeze(1).tolist() == [[7, 3, 4, 6], [1, 4, 5, 6]]
    assert scales.flatten().tolist() == [2, 1]
    assert zeros.flatten().tolist() == [4, 4]
    assert fake_quantize(weight, Scheme(3, 4, symmetric=True)).tolist() == [[6, -2, 0, 4], [-3, 0, 1, 2]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_levels_mirror_around_the_middle_code(bits: int) -> None:
    torch.manual_seed(0)
    weight, scheme = torch.randn(64, 32), Scheme(bits, 8, symmetric=True)
    codes, scales, zeros = quantize(weight, scheme)
    assert (zeros == 2 ** (bits - 1)).all()
    assert torch.equal(fake_quantize(-weight, scheme), -fake_quantize(weight, scheme))
    assert (codes.amin(), codes.amax()) == (1, 2**bits - 1)
    error = (fake_quantize(weight, scheme) - weight).unflatten(-1, (-1, 8)).abs()
    assert (error <= scales * 0.501).all()  # nothing is clipped: only rounding, half a step


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_constant_group_stays_finite(symmetric: bool) -> None:
    scheme = Scheme(4, 8, symmetric)
    assert torch.equal(fake_quantize(torch.zeros(2, 8), scheme), torch.zeros(2, 8))
    assert fake_quantize(torch.full((2, 8), 0.3), scheme).isfinite().all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_leading_dimensions_are_a_batch(symmetric: bool) -> None:
    torch.manual_seed(0)
    weight, scheme = torch.randn(3, 5, 16), Scheme(3, 8, symmetric)
    one_by_one = torch.stack([fake_quantize(w, scheme) for w in weight])
    assert torch.equal(fake_quantize(weight, scheme), one_by_one)


def test_keeps_dtype_and_input() -> None:
    torch.manual_seed(0)
    weight, scheme = torch.randn(4, 16, dtype=torch.bfloat16), Scheme(4, 8)
    before = weight.clone()
    rounded = fake_quantize(weight, scheme)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(weight, before)
    assert torch.equal(rounded, fake_quantize(weight.float(), scheme).bfloat16())


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
