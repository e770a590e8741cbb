"""The norm, the MLP and the rotation of a routed model against Hugging Face's, whatever they are computed by.

Tolerances: float32 sums in another order (tests/tolerance.py); in bfloat16 such a sum may round otherwise, 2⁻⁷ of a
value, and what is computed from it, 2⁻⁶ of the largest.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from qtale_lightning import cpu
from qtale_lightning.models.fused import FusedMLP, FusedRMSNorm, rotate
from tests import tolerance

WIDEST = 32 + 40  # the products of an MLP, the longest way here
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations of ours that were called."""
    done: list[str] = []
    for name in ("rms_norm", "swiglu", "rotate"):

        def spy(*args: Tensor, name: str = name, run: object = getattr(cpu, name)) -> Tensor:
            done.append(name)
            return run(*args)  # type: ignore[operator]

        monkeypatch.setattr(cpu, name, spy)
    return done


def norms(width: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = LlamaRMSNorm(width, eps=1e-5)
    nn.init.normal_(plain.weight)
    routed = copy.deepcopy(plain)
    routed.__class__ = type("RoutedNorm", (FusedRMSNorm, LlamaRMSNorm), {})
    return plain.to(dtype), routed.to(dtype)


def mlps(width: int, dtype: torch.dtype, act: str = "silu") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=width, hidden_act=act))
    routed = copy.deepcopy(plain)
    routed.__class__ = type("RoutedMLP", (FusedMLP, LlamaMLP), {})
    return plain.to(dtype), routed.to(dtype)


def close(actual: Tensor, expected: Tensor) -> None:
    if expected.dtype == torch.float32:
        tolerance.close(actual, expected, WIDEST)
    else:
        largest = float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-6 * largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 40])
@torch.no_grad()
def test_inference(operations: bool, calls: list[str], width: int, dtype: torch.dtype) -> None:
    """Widths and dtypes that our operations don't take are PyTorch's, to the last bit."""
    x = torch.randn(2, 3, width).to(dtype)
    heads, angles = torch.randn(2, 3, 4, width).to(dtype), torch.randn(1, 3, width)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    plain, routed = norms(width, dtype)
    close(routed(x), plain(x))
    turned = apply_rotary_pos_emb(heads, heads, cos, sin, unsqueeze_dim=2)[0]
    assert torch.equal(rotate(heads, cos, sin), turned)
    plain, routed = mlps(width, dtype)
    hidden = torch.randn(2, 3, 32).to(dtype)
    close(routed(hidden), plain(hidden))
    taken = operations and width == 32 and dtype != torch.float16
    assert calls == (["rms_norm", "rotate", "swiglu"] if taken else [])


@torch.no_grad()
def test_another_activation(operations: bool, calls: list[str]) -> None:
    plain, routed = mlps(32, torch.float32, "gelu")
    x = torch.randn(2, 32)
    assert torch.equal(routed(x), plain(x))
    assert not calls


def test_gradients_are_hugging_faces(calls: list[str]) -> None:
    for make in (norms, mlps):
        gradients = []
        for module in make(32, torch.float32):
            x = torch.ones(2, 32).mul_(torch.arange(32)).requires_grad_()
            module(x).square().sum().backward()
            assert x.grad is not None
            gradients.append([x.grad, *(p.grad for p in module.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not calls


@torch.no_grad()
def test_tokens_need_not_be_contiguous(operations: bool) -> None:
    plain, routed = norms(32, torch.float32)
    x = torch.randn(32, 5).T
    close(routed(x), plain(x))
    heads = torch.randn(2, 4, 3, 32).transpose(1, 2)
    angles = torch.randn(32, 3).T[None]
    turned = apply_rotary_pos_emb(heads, heads, angles, angles, unsqueeze_dim=2)[0]
    assert torch.equal(rotate(heads, angles, angles), turned)


@torch.no_grad()
def test_a_compiled_model_has_pytorchs_operations(calls: list[str]) -> None:
    """Which its compiler knows and fuses."""
    plain, routed = norms(32, torch.float32)
    x = torch.randn(2, 32)
    compiled = torch.compile(routed, backend="eager", fullgraph=True)
    close(compiled(x), plain(x))
    assert not calls
