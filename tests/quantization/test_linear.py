"""The quantized linear: nothing is lost in storage but the scales' rounding to float16, and it runs as it is read."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from qtale_lightning import cpu
from qtale_lightning.quantization import linear as linear_module
from qtale_lightning.quantization.linear import Layout, QuantizedLinear
from qtale_lightning.quantization.rtn import Quantized, Scheme, fake_quantize, quantize
from tests.tolerance import close

OUTPUTS, INPUTS, GROUP = 64, 96, 32
STORED: list[tuple[int, Layout, bool]] = [
    (4, "gemm", False),
    (4, "tight", True),
    (2, "tight", False),
    (3, "tight", False),
    (8, "tight", False),
    (5, "tight", True),
]
stored = pytest.mark.parametrize(("bits", "layout", "symmetric"), STORED)


def make_weight() -> Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)) * 0.1


def make_linear(
    bits: int = 4, layout: Layout = "gemm", symmetric: bool = False, bias: Tensor | None = None
) -> QuantizedLinear:
    weight = quantize(make_weight(), Scheme(bits, GROUP, symmetric))
    return QuantizedLinear.of(weight, bits, layout, bias)


def make_input(*shape: int) -> Tensor:
    return torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(1))


@stored
def test_what_is_stored_is_what_was_given(bits: int, layout: Layout, symmetric: bool) -> None:
    given = quantize(make_weight(), Scheme(bits, GROUP, symmetric))
    codes, scales, zeros = make_linear(bits, layout, symmetric).quantized()
    assert codes.shape == (OUTPUTS, INPUTS // GROUP, GROUP)
    assert torch.equal(codes.float(), given.codes)
    assert torch.equal(zeros, given.zeros)
    assert torch.equal(scales, given.scales.half().float())


@stored
def test_it_stands_for_the_rounded_weight(bits: int, layout: Layout, symmetric: bool) -> None:
    """Up to its scales, which float16 holds to 2⁻¹¹ (here they are far above its subnormal numbers)."""
    values = make_linear(bits, layout, symmetric).dequantize()
    expected = fake_quantize(make_weight(), Scheme(bits, GROUP, symmetric))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected, rtol=1.001 * 2**-11, atol=0)


def test_the_layouts_shapes() -> None:
    """AutoAWQ's for `gemm`; for `tight` the outputs first, and no byte more than the bits need."""
    gemm, tight = make_linear(), make_linear(3, "tight")
    groups = INPUTS // GROUP
    assert {name: (tuple(t.shape), t.dtype) for name, t in gemm.state_dict().items()} == {
        "qweight": ((INPUTS, OUTPUTS // 8), torch.int32),
        "qzeros": ((groups, OUTPUTS // 8), torch.int32),
        "scales": ((groups, OUTPUTS), torch.float16),
    }
    assert {name: (tuple(t.shape), t.dtype) for name, t in tight.state_dict().items()} == {
        "qweight": ((OUTPUTS, INPUTS * 3 // 8), torch.uint8),
        "qzeros": ((OUTPUTS * groups * 3 // 8,), torch.uint8),
        "scales": ((OUTPUTS, groups), torch.float16),
    }


@stored
def test_an_empty_one_takes_the_stored_tensors(bits: int, layout: Layout, symmetric: bool) -> None:
    """The constructor's shapes are those that `of` makes."""
    whole = make_linear(bits, layout, symmetric, torch.ones(OUTPUTS))
    empty = QuantizedLinear(INPUTS, OUTPUTS, bits, GROUP, layout, bias=True)
    empty.load_state_dict(whole.state_dict())
    assert torch.equal(empty.dequantize(), whole.dequantize())
    assert empty.bias is not None
    assert torch.equal(empty.bias, torch.ones(OUTPUTS))


@pytest.mark.parametrize("shape", [(), (2, 3), (5,), (2, 40), (0,)])
@stored
@torch.no_grad()
def test_forward(bits: int, layout: Layout, symmetric: bool, shape: tuple[int, ...]) -> None:
    """`y = x · Qᵀ + b` over any leading dimensions; float32, so that the sums' order alone differs."""
    bias = torch.linspace(-1, 1, OUTPUTS)
    module, x = make_linear(bits, layout, symmetric, bias), make_input(*shape)
    expected = nn.functional.linear(x, module.dequantize(), bias)
    output = module(x)
    assert (output.shape, output.dtype) == ((*shape, OUTPUTS), torch.float32)
    close(output, expected, INPUTS)
    torch.testing.assert_close(module(x), output, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_forward_in_the_inputs_dtype(dtype: torch.dtype) -> None:
    """Also where the bias was left in float32."""
    module, x = make_linear(bias=torch.ones(OUTPUTS)), make_input(2, 3).to(dtype)
    expected = nn.functional.linear(x.float(), module.dequantize(), torch.ones(OUTPUTS))
    output = module(x)
    assert output.dtype == dtype
    assert (output.float() - expected).norm() <= 2**-7 * expected.norm()


@pytest.mark.parametrize("tokens", [1, 100])
@pytest.mark.parametrize("bits", [4, 8])
def test_it_runs_where_gradients_are_recorded(bits: int, tokens: int) -> None:
    """As a model does that someone calls without `no_grad`: its embeddings require them."""
    module = make_linear(bits, "tight")
    for dtype in (torch.float32, torch.bfloat16):
        x = make_input(tokens).to(dtype).requires_grad_()
        output = module(x)
        assert not output.requires_grad
        assert torch.equal(output, module(x.detach()))


def test_the_bias_is_a_copy_that_is_not_trained() -> None:
    bias = nn.Parameter(torch.ones(OUTPUTS))
    module = make_linear(bias=bias)
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    assert module.bias is not None
    assert not module.bias.requires_grad
    bias.data.zero_()
    assert module.bias.min() == 1
    assert make_linear().bias is None


@pytest.mark.parametrize("scale", [1e-9, 1e5, float("inf"), float("nan"), 0.0])
def test_a_scale_outside_float16_is_refused(scale: float) -> None:
    codes, scales, zeros = quantize(make_weight(), Scheme(4, GROUP))
    scales[3, 1] = scale
    with pytest.raises(ValueError, match="leaves the range of float16"):
        QuantizedLinear.of(Quantized(codes, scales, zeros), 4, "gemm")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_of_zeros_has_any_scale(bits: int) -> None:
    """A dead neuron's, whose row AWQ's search divided by a scale of 50."""
    weight = make_weight()
    weight[3, :GROUP] = 0
    codes, scales, zeros = quantize(weight, Scheme(bits, GROUP))
    scales[3, 0] /= 50
    assert scales[3, 0].half() == 0
    values = QuantizedLinear.of(Quantized(codes, scales, zeros), bits, "tight").dequantize()
    assert not values[3, :GROUP].any()
    torch.testing.assert_close(
        values, fake_quantize(weight, Scheme(bits, GROUP)), rtol=1.001 * 2**-11, atol=0
    )


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [((12, 32), "gemm", "8 outputs, not 12"), ((4, 32), "tight", "4 codes"), ((8, 36), "tight", "36 codes")],
)
def test_a_shape_that_does_not_fit_the_layout_is_refused(
    shape: tuple[int, int], layout: Layout, message: str
) -> None:
    weight = quantize(torch.ones(shape), Scheme(4, shape[1]))
    with pytest.raises(ValueError, match=message):
        QuantizedLinear.of(weight, 4, layout)


# Once it runs --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_it_keeps_one_layout_only() -> None:
    module = make_linear()
    assert module.kernel is None
    module(make_input(1))
    assert module.kernel is not None
    assert list(module.buffers()) == []


@torch.no_grad()
def test_a_running_one_can_not_be_stored() -> None:
    module = make_linear()
    module(make_input(1))
    for use in (module.state_dict, module.quantized, module.dequantize, lambda: module.to("meta")):
        with pytest.raises(
            RuntimeError, match=r"runs already.*load its folder again to save, convert or move"
        ):
            use()


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@torch.no_grad()
def test_a_new_dtype_leaves_the_weight_alone(dtype: torch.dtype, running: bool) -> None:
    module, x = make_linear(), make_input(3)
    expected = copy.deepcopy(module)(x.to(dtype))
    stored = copy.deepcopy(module.scales)
    if running:
        module(x)
    moved = nn.Sequential(module).to(dtype)
    if not running:
        assert module.scales is not None
        assert stored is not None
        assert module.scales.dtype == torch.float16
        assert torch.equal(module.scales, stored)
    assert torch.equal(moved(x.to(dtype)), expected)


def test_it_moves_before_it_runs() -> None:
    module = make_linear(bias=torch.ones(OUTPUTS)).to("meta")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    assert {name: tensor.dtype for name, tensor in module.state_dict().items()} == {
        name: tensor.dtype for name, tensor in make_linear(bias=torch.ones(OUTPUTS)).state_dict().items()
    }


@pytest.mark.parametrize("running", [False, True])
@torch.no_grad()
def test_a_copy_is_independent(running: bool) -> None:
    module, x = make_linear(bias=torch.ones(OUTPUTS)), make_input(3)
    expected = copy.deepcopy(module)(x)
    if running:
        module(x)
    copied = copy.deepcopy(module)
    assert copied.kernel is None or copied.kernel is not module.kernel
    assert copied.bias is not None
    copied.bias.zero_()
    assert torch.equal(copied(x) + 1, expected)
    assert torch.equal(module(x), expected)


@torch.no_grad()
def test_the_path_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "_logged", set())
    monkeypatch.setattr(cpu, "available", lambda: False)
    with caplog.at_level(logging.INFO, linear_module.__name__):
        for bits, layout, symmetric in (STORED[4], STORED[4], STORED[5]):
            module = make_linear(bits, layout, symmetric)
            module(make_input(2))
            module(make_input(2))
    (message,) = (record.getMessage() for record in caplog.records)
    assert message == "quantized linears on cpu (8 bits first): dequantize at every call"


def test_it_prints_what_it_is() -> None:
    assert str(make_linear(3, "tight")) == "QuantizedLinear(96, 64, bits=3, group_size=32)"
