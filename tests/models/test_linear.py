"""The matrix-vector product of one bfloat16 token, and that nothing else changes.

A bfloat16 product is summed in float32 and rounded once: half a unit in the last place, 2⁻⁸ of the value at most, and
what float32 sums lose where terms cancel, 2⁻²⁴ of Σ|x w| a step at most. Both kernels keep within that.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from qtale_lightning.models import linear
from qtale_lightning.models.linear import RoutedLinear

INPUTS, OUTPUTS = 200, 72  # no multiples of what a kernel takes at a time


def pair(dtype: torch.dtype, bias: bool = False) -> tuple[nn.Linear, RoutedLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(INPUTS, OUTPUTS, bias=bias, dtype=dtype)
    routed = copy.deepcopy(plain)
    routed.__class__ = RoutedLinear
    return plain, routed  # type: ignore[return-value]


def tokens(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The matrix-vector products that were asked for."""
    done, product = [], torch.mv

    def record(matrix: Tensor, vector: Tensor) -> Tensor:
        done.append(product(matrix, vector))
        return done[-1]

    monkeypatch.setattr(torch, "mv", record)
    monkeypatch.setattr(linear, "reads_faster_alone", lambda: True)
    return done


@torch.no_grad()
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_bfloat16_token_is_right_within_rounding(shape: tuple[int, ...], products: list[Tensor]) -> None:
    plain, routed = pair(torch.bfloat16)
    x = tokens(*shape)
    exact = x.double() @ plain.weight.double().T
    terms = x.double().abs() @ plain.weight.double().abs().T
    bound = 2**-8 * exact.abs() + 2**-24 * INPUTS * terms
    y = routed(x)
    assert products
    assert y.dtype == torch.bfloat16
    assert y.shape == (*shape, OUTPUTS)
    for result in (y, plain(x)):
        assert ((result.double() - exact).abs() <= bound).all()


@torch.no_grad()
def test_a_column_of_a_wider_tensor_is_one_token(products: list[Tensor]) -> None:
    _, routed = pair(torch.bfloat16)
    x = tokens(1, 4)[:, 2:3]
    assert torch.equal(routed(x), routed(x.contiguous()))
    assert len(products) == 2


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "dtype", "bias"),
    [
        ((1, 1), torch.float32, False),
        ((2, 5), torch.float32, True),
        ((1, 2), torch.bfloat16, False),
        ((3, 1), torch.bfloat16, False),
        ((1, 1), torch.bfloat16, True),
    ],
)
def test_all_else_is_the_linear_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool, products: list[Tensor]
) -> None:
    plain, routed = pair(dtype, bias)
    x = tokens(*shape, dtype=dtype)
    assert torch.equal(routed(x), plain(x))
    assert not products


@torch.no_grad()
def test_where_the_kernel_is_slower_it_isnt_called(
    products: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "reads_faster_alone", lambda: False)
    plain, routed = pair(torch.bfloat16)
    assert torch.equal(routed(tokens(1, 1)), plain(tokens(1, 1)))
    assert not products


def test_gradients_are_the_linears(products: list[Tensor]) -> None:
    gradients = []
    for one in pair(torch.bfloat16):
        x = tokens(1, 1).requires_grad_()
        one(x).square().sum().backward()
        assert one.weight.grad is not None
        assert x.grad is not None
        gradients.append((one.weight.grad, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert gradients[0][0].any()
    assert not products


@torch.no_grad()
def test_a_token_of_the_wrong_width_is_refused() -> None:
    _, routed = pair(torch.bfloat16)
    with pytest.raises(RuntimeError, match="shapes"):
        routed(tokens(1).view(1, 2, INPUTS // 2))  # as many numbers as one token has
