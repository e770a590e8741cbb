"""Attention without rows: one sequence after the other, and by the variable-length kernel's arguments."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qtale_lightning.compat import kernels
from qtale_lightning.models import attention
from tests.tolerance import close

COUNTS = (7, 0, 4, 1)
ENDS = torch.tensor([0, 7, 7, 11, 12], dtype=torch.int32)


def reference(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention within each sequence of ``(N, H, d)``, written out."""
    sequence = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))
    visible = (sequence[:, None] == sequence).tril()
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scaling
    return torch.einsum("hqk,khd->qhd", scores.where(visible, float("-inf")).softmax(-1), value)


@pytest.fixture(params=[6, 2])
def heads(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, with as many key heads as query heads and with fewer."""
    torch.manual_seed(0)
    return tuple(torch.randn(sum(COUNTS), n, 8) for n in (6, request.param, request.param))  # type: ignore[return-value]


def test_one_sequence_after_the_other(heads: tuple[Tensor, Tensor, Tensor]) -> None:
    found = attention._one_by_one(*heads, COUNTS, 0.3)
    close(found, reference(*heads, 0.3), 8 + max(COUNTS))


Asked = dict[str, Any]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What the kernel, which needs a GPU, is asked for: checked against its documentation."""
    asked: Asked = {}

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, *longest: int, **more: Any
    ) -> Tensor:
        asked.update(
            more, heads=(key, value), cu=(cu_q.tolist(), cu_k.tolist()), longest=longest, dtype=cu_q.dtype
        )
        return query

    monkeypatch.setattr(kernels.varlen, "varlen_attn", kernel)
    return asked


def test_the_kernels_arguments(
    heads: tuple[Tensor, Tensor, Tensor], asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_GROUPED_HEADS", True)
    kernels.variable_length_attention(*heads, ENDS, max(COUNTS), 0.3)
    ends = [0, 7, 7, 11, 12]
    assert asked.pop("heads") == heads[1:]
    assert asked == {
        "cu": (ends, ends),
        "dtype": torch.int32,
        "longest": (7, 7),
        "scale": 0.3,
        "window_size": (-1, 0),  # causal
        "enable_gqa": heads[0].shape[1] != heads[1].shape[1],
    }


def test_a_kernel_without_grouped_heads_is_given_as_many_keys_as_queries(
    heads: tuple[Tensor, Tensor, Tensor], asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of PyTorch 2.11, which doesn't know the argument."""
    monkeypatch.setattr(kernels, "_GROUPED_HEADS", False)
    kernels.variable_length_attention(*heads, ENDS, max(COUNTS), 0.3)
    assert "enable_gqa" not in asked
    repeats = heads[0].shape[1] // heads[1].shape[1]
    for given, expected in zip(asked["heads"], heads[1:], strict=True):
        assert torch.equal(given, expected.repeat_interleave(repeats, dim=1))


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "taken"),
    [
        ((9, 0), torch.bfloat16, 64, True),
        ((8, 0), torch.float16, 256, True),
        ((7, 5), torch.float16, 64, False),  # the kernel is made for Ampere and later
        ((9, 0), torch.float32, 64, False),
        ((9, 0), torch.bfloat16, 20, False),
        ((9, 0), torch.bfloat16, 264, False),
    ],
)
def test_which_heads_the_kernel_is_given(
    capability: tuple[int, int], dtype: torch.dtype, width: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        assert (
            kernels.takes_variable_lengths(torch.empty(1, 5, 2, width, dtype=dtype, device="cuda")) == taken
        )
    assert not kernels.takes_variable_lengths(torch.empty(1, 5, 2, width, dtype=dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs a GPU")
def test_the_kernel_on_a_gpu(heads: tuple[Tensor, Tensor, Tensor]) -> None:
    low = [x.repeat(1, 1, 8).to("cuda", torch.bfloat16) for x in heads]  # heads of 64, which the kernel takes
    found = kernels.variable_length_attention(*low, ENDS.cuda(), max(COUNTS), 0.3)
    expected = reference(*(x.float().cpu() for x in low), 0.3)
    torch.testing.assert_close(found.float().cpu(), expected, rtol=0, atol=3e-2)  # bfloat16 of values up to 4
