"""The packed tensors, bit for bit AutoAWQ's own: `WQLinear_GEMM.from_linear` of the same weights.

As in AutoAWQ's run, the weights that it packs are what `pseudo_quantize_tensor` leaves, and it finds their codes again
by division. Its rounding has room for that: float16 moves a scale by 2⁻¹¹ at most, a code by 0.01.
"""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtale_lightning.quantization import autoawq
from qtale_lightning.quantization.linear import QuantizedLinear
from qtale_lightning.quantization.rtn import Scheme, quantize

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

GROUP = 32


def modules() -> tuple[Any, Any]:
    """AutoAWQ's linear, and its functions that unpack."""
    with warnings.catch_warnings():  # the package puts its own filter before all others
        warnings.simplefilter("ignore")
        from awq.modules.linear.gemm import WQLinear_GEMM
        from awq.utils import packing_utils
    return WQLinear_GEMM, packing_utils


def make_weight(kind: str) -> Tensor:
    """Shape `(64, 128)`, four groups a row."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    if kind == "loud":  # scales over six orders of magnitude, down to where AWQ's floor of 1e-5 holds
        weight = weight * torch.logspace(-5, 2, 64)[:, None]
    elif kind == "one sign":  # levels always reach zero: codes are clipped, zero points are 0 and 15
        weight = torch.cat([weight[:32].abs() + 0.1, -weight[32:].abs() - 0.1])
    elif kind == "constant":
        weight[:16], weight[16:32], weight[32:48, :32] = 0.0, 0.25, -0.25
    elif kind == "single":  # one weight in a group
        weight = torch.zeros(64, 128)
        weight[torch.arange(64), torch.arange(64)] = torch.linspace(-1, 1, 64)
    return weight


@pytest.mark.parametrize("kind", ["random", "loud", "one sign", "constant", "single"])
def test_packed_bit_for_bit(kind: str) -> None:
    linear = nn.Linear(128, 64, bias=False)
    weight = make_weight(kind)
    values, scales, zeros = autoawq.make_quantizer(Scheme(4, GROUP)).pseudo_quantize_tensor(weight)
    linear.weight.data = values
    wqlinear, _ = modules()
    theirs = wqlinear.from_linear(
        linear, 4, GROUP, scales=scales.t().contiguous(), zeros=zeros.t().contiguous()
    )
    ours = QuantizedLinear.of(quantize(weight, Scheme(4, GROUP)), 4, "gemm")
    for name in ("qweight", "qzeros", "scales"):
        packed, expected = getattr(ours, name), getattr(theirs, name)
        assert (packed.dtype, packed.shape) == (expected.dtype, expected.shape), name
        assert torch.equal(packed, expected), name
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_autoawq_reads_ours() -> None:
    """Also where the sign bit of an int32 is a code's."""
    weight = quantize(make_weight("random"), Scheme(4, GROUP))
    ours = QuantizedLinear.of(weight, 4, "gemm")
    _, utils = modules()
    codes, zeros = utils.reverse_awq_order(*utils.unpack_awq(ours.qweight, ours.qzeros, 4), 4)
    assert torch.equal((codes & 15).T.float(), weight.codes.flatten(1))
    assert torch.equal((zeros & 15).T.float(), weight.zeros.squeeze(-1))
    values = utils.dequantize_gemm(ours.qweight, ours.qzeros, ours.scales, 4, GROUP)
    # Its product is rounded to float16: half of a last bit.
    torch.testing.assert_close(values.T.float(), ours.dequantize(), rtol=2**-11, atol=1e-7)
