"""Products of few tokens, and that nothing else changes.

A bfloat16 product is summed in float32 and rounded once: half a unit in the last place, 2⁻⁸ of the value at most, and
what float32 sums lose where terms cancel, 2⁻²⁴ of Σ|x w| a step at most. Both ways keep within that; in float32 it is
these sums alone.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from qtale_lightning import cpu
from qtale_lightning.models.linear import RoutedLinear

INPUTS, OUTPUTS = 208, 80  # no multiples of 32


def pair(dtype: torch.dtype, bias: bool = False, outputs: int = OUTPUTS) -> tuple[nn.Linear, RoutedLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(INPUTS, outputs, bias=bias, dtype=dtype)
    routed = copy.deepcopy(plain)
    routed.__class__ = RoutedLinear
    return plain, routed  # type: ignore[return-value]


def tokens(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Those that our operation was asked for."""
    done, product = [], cpu.dense_linear

    def record(*args: Tensor) -> Tensor:
        done.append(product(*args))
        return done[-1]

    monkeypatch.setattr(cpu, "dense_linear", record)
    return done


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1, 1), (2,), (1, 3), (5, 1), (7,), (2, 4), (16,)])
def test_few_tokens_are_right_within_rounding(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool, products: list[Tensor], operations: bool
) -> None:
    plain, routed = pair(dtype, bias)
    x = tokens(*shape, dtype=dtype)
    exact, terms = x.double() @ plain.weight.double().T, x.double().abs() @ plain.weight.double().abs().T
    if plain.bias is not None:
        exact, terms = exact + plain.bias.double(), terms + plain.bias.double().abs()
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-24
    bound = rounding * exact.abs() + 2**-24 * INPUTS * terms
    y = routed(x)
    assert bool(products) == operations
    assert y.dtype == dtype
    assert y.shape == (*shape, OUTPUTS)
    assert ((y.double() - exact).abs() <= bound).all()


@torch.no_grad()
def test_a_column_of_a_wider_tensor_is_one_token() -> None:
    _, routed = pair(torch.bfloat16)
    x = tokens(1, 4)[:, 2:3]
    assert torch.equal(routed(x), routed(x.contiguous()))


@torch.no_grad()
@pytest.mark.parametrize(
    ("shape", "dtype", "outputs"),
    [
        ((129,), torch.float32, OUTPUTS),
        ((2, 65), torch.bfloat16, OUTPUTS),
        ((0, 3), torch.bfloat16, OUTPUTS),
        ((1, 1), torch.float16, OUTPUTS),
        ((1, 1), torch.bfloat16, OUTPUTS - 8),
    ],
)
def test_all_else_is_the_linear_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, outputs: int, products: list[Tensor]
) -> None:
    plain, routed = pair(dtype, True, outputs)
    x = tokens(*shape, dtype=dtype)
    assert torch.equal(routed(x), plain(x))
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


@torch.no_grad()
def test_a_compiled_linear_is_pytorchs(products: list[Tensor]) -> None:
    plain, routed = pair(torch.bfloat16, True)
    x = tokens(2, 4)
    assert torch.equal(torch.compile(routed, backend="eager", fullgraph=True)(x), plain(x))
    assert not products


def test_on_another_device_nothing_is_asked_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither that its operations be compiled, nor what it can."""
    monkeypatch.setattr(cpu, "available", pytest.fail)
    monkeypatch.setattr(cpu, "few_tokens", pytest.fail)
    _, routed = pair(torch.float32, True)
    with torch.no_grad():
        assert routed.to("meta")(tokens(2, 4).to("meta")).device.type == "meta"
