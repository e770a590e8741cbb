"""Kernels for CUDA of PyTorch: which GPUs have them, and how each version is asked for them."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen

# PyTorch 2.11 has no such argument, and promises nothing for fewer heads of keys than of queries.
_GROUPED_HEADS = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
# The widest heads of PyTorch's variable-length attention, and what their width is a multiple of.
_WIDEST_HEAD, _HEAD_LANES = 256, 8


def has_bfloat16_kernels(device: torch.device) -> bool:
    """Whether a device is a GPU of compute capability 8.0 or more (Ampere), which PyTorch's kernels in half precision
    are made for: variable-length attention and int4 products."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def takes_variable_lengths(key: Tensor) -> bool:
    """Whether :func:`variable_length_attention` takes heads like ``key (…, d)``."""
    width = key.shape[-1]
    fits = width % _HEAD_LANES == 0 and width <= _WIDEST_HEAD
    return fits and key.dtype in (torch.float16, torch.bfloat16) and has_bfloat16_kernels(key.device)


def variable_length_attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scaling: float
) -> Tensor:
    """Causal attention within each of several sequences, ``(N, H, d)``, by PyTorch's kernel for CUDA.

    Args:
        query: ``(N, H, d)``, all sequences one after the other.
        key, value: ``(N, H_kv, d)``; H is a multiple of H_kv.
        ends: Where sequences end, the first of them behind a 0, int32 ``(B + 1,)``.
        longest: Tokens of the longest sequence.
        scaling: Of the scores.
    """
    more: dict[str, Any] = {}
    if _GROUPED_HEADS:
        more["enable_gqa"] = query.shape[1] != key.shape[1]
    elif (repeats := query.shape[1] // key.shape[1]) > 1:
        key, value = (heads.repeat_interleave(repeats, dim=1) for heads in (key, value))
    output = varlen.varlen_attn(
        query, key, value, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0), **more
    )
    assert isinstance(output, Tensor)  # nothing else was asked for
    return output
