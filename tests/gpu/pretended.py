"""A GPU that isn't there: tensors that say they are on `cuda`, and are computed on the CPU.

What a GPU refuses is refused: operations on tensors of both devices (but for single numbers and indices of the CPU),
NumPy views, and operations that are made for the CPU alone. So code that was never on a GPU shows, on a machine without
one, where it forgets to move a tensor. What a GPU computes otherwise, it doesn't show.
"""

import os
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import varlen  # noqa: F401  (registers its operation)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from qtale_lightning import cuda

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# Operations that may read a tensor of the CPU beside those of the GPU.
MOVES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


def _variable_lengths(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool,
    scale: float, window_size: list[int], *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Causal attention of sequences, as PyTorch's operation takes it."""
    assert causal
    assert window_size == [-1, 0]
    assert query.dtype == key.dtype == value.dtype in (torch.float16, torch.bfloat16)
    assert query.shape[-1] % 8 == 0
    assert cu_q.dtype == cu_k.dtype == torch.int32
    counts = cu_q.diff().tolist()
    assert (max_q, max_k) == (max(counts), max(counts))
    heads = [[x.transpose(0, 1) for x in tensor.split(counts)] for tensor in (query, key, value)]
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        for q, k, v in zip(*heads, strict=True) if q.shape[1]
    ]  # fmt: skip
    empty = query.new_empty(0)
    return torch.cat(outputs, 1).transpose(0, 1).contiguous(), empty, empty


def _int4_pack(nibbles: Tensor, inner_tiles: int) -> Tensor:
    """The shape of the kernel's layout, though not its order."""
    outputs, half = nibbles.shape
    assert nibbles.dtype == torch.uint8
    assert outputs % 8 == 0
    assert inner_tiles in (2, 4, 8)
    assert 2 * half % (16 * inner_tiles) == 0
    shape = (outputs // 8, 2 * half // (16 * inner_tiles), 32, inner_tiles // 2)
    return nibbles.contiguous().view(torch.int32).view(shape)


def _int4_product(x: Tensor, packed: Tensor, group_size: int, scales_and_offsets: Tensor) -> Tensor:
    """x · Wᵀ in bfloat16, W = (code - 8) · scale + offset."""
    assert x.dtype == scales_and_offsets.dtype == torch.bfloat16
    assert x.is_contiguous()
    assert scales_and_offsets.is_contiguous()
    assert group_size in (32, 64, 128, 256)
    outputs, inputs = 8 * packed.shape[0], x.shape[1]
    assert scales_and_offsets.shape == (inputs // group_size, outputs, 2)
    nibbles = packed.view(outputs, -1).view(torch.uint8)
    codes = torch.stack([nibbles >> 4, nibbles & 15], -1).view(outputs, inputs)
    scales, offsets = scales_and_offsets.float().repeat_interleave(group_size, 0).unbind(-1)
    return (x.float() @ ((codes.float().T - 8) * scales + offsets)).bfloat16()


# What PyTorch has for CUDA alone, with the demands that it makes.
KERNELS = {
    torch.ops.torch_attn._varlen_attn.default: _variable_lengths,
    aten._convert_weight_to_int4pack.default: _int4_pack,
    aten._weight_int4pack_mm.default: _int4_product,
}


class OnGPU(Tensor):
    """A tensor of the GPU: nothing but a name for one of the CPU, `held`."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> "OnGPU":
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            device=GPU,
        )  # fmt: skip

    def __init__(self, real: Tensor) -> None:
        self.held = real

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGPU({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with torch.no_grad():
            copied = self.detach().clone()
        made = (
            torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
        )
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, structure = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    there = any(isinstance(x, OnGPU) for x in tensors)
    if func is aten._fused_sdp_choice.default and there:
        return 0  # the definition in products and softmax
    _refuse_mixture(func, tensors, flat) if there else None
    asked = kwargs.get("device")
    target = there if asked is None else torch.device(asked).type == "cuda"
    real = [x.held if isinstance(x, OnGPU) else torch.device("cpu") if _is_gpu(x) else x for x in flat]
    real_args, real_kwargs = tree_unflatten(real, structure)
    if there and (kernel := KERNELS.get(func)) is not None:
        func = kernel
    if there and "_for_cpu" in str(func):
        raise NotImplementedError(f"{func} is made for the CPU")
    found = func(*real_args, **real_kwargs)
    if not target:
        return found
    names = {id(x.held): x for x in tensors if isinstance(x, OnGPU)}  # in place: the same name
    return tree_map_only(Tensor, lambda x: names.get(id(x)) if id(x) in names else OnGPU(x), found)


def _is_gpu(x: Any) -> bool:
    return isinstance(x, torch.device) and x.type == "cuda"


def _is_list(x: Any) -> bool:
    return isinstance(x, list)


def _numbered(device: Any) -> Any:
    return GPU if device in ("cuda", torch.device("cuda")) else device


def _refuse_mixture(func: Any, tensors: list[Tensor], flat: list[Any]) -> None:
    if func in MOVES or func in INDEXING:
        return
    for x in tensors:
        if not isinstance(x, OnGPU) and x.dim() > 0 and x.device.type == "cpu":
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, but found cuda:0 and cpu"
            )


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What wrapped tensors can't be asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A device without a number is looked up in a library that isn't there.
        kwargs = kwargs or {}
        if func is not torch.device:
            args, kwargs = tree_map_only((str, torch.device), _numbered, (args, kwargs))
        # What PyTorch makes of Python's numbers, it makes behind the dispatcher.
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == GPU:
            return func(*args, **kwargs | {"device": "cpu"}).to(GPU)
        if func is Tensor.new_tensor and isinstance(args[0], OnGPU):
            return args[0].held.new_tensor(*args[1:], **kwargs).to(GPU)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], tree_map_only(list, torch.tensor, args[1], is_leaf=_is_list), *args[2:])
        if args and isinstance(args[0], OnGPU):
            if func in (Tensor.tolist, Tensor.data_ptr):
                return func(args[0].held, *args[1:], **kwargs)
            if func is Tensor.numpy:
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return func(*args, **kwargs)


GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


@cache
def _let_devices_be_chosen() -> None:
    """PyTorch without CUDA has nothing that chooses its device, where indexing asks for it: here it does nothing."""
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(GUARD, encoding="utf-8")
        command = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++20", "-O0", "-shared", "-fPIC"]
        command += [
            f"-I{torch_folder / 'include'}",
            str(source),
            "-o",
            str(library),
            f"-L{torch_folder / 'lib'}",
            "-lc10",
        ]
        subprocess.run(command, check=True)
        torch.ops.load_library(library)


@contextmanager
def pretended_gpu() -> Iterator[str]:
    """Inside, "cuda" is a device, of compute capability 9.0."""
    generator, overwrite = torch.Generator, torch.__future__.set_overwrite_module_params_on_conversion
    _let_devices_be_chosen()
    with ExitStack() as stack:
        for name, value in {
            "is_available": lambda: True, "device_count": lambda: 1, "_lazy_init": lambda: None,
            "is_initialized": lambda: True, "current_device": lambda: 0, "is_bf16_supported": lambda *_: True,
            "get_device_capability": lambda *_: (9, 0), "get_device_name": lambda *_: "a pretended GPU",
            "synchronize": lambda *_: None, "manual_seed_all": lambda *_: None,
            "get_rng_state": lambda *_: torch.empty(0), "set_rng_state": lambda *_: None,
        }.items():  # fmt: skip
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        # Triton asks for a real one.
        stack.enter_context(mock.patch.object(cuda, "available", return_value=False))
        # A moved module's parameters are new ones: an old one can't take over a tensor of another class.
        stack.callback(overwrite, torch.__future__.get_overwrite_module_params_on_conversion())
        overwrite(True)
        on_the_cpu = lambda device="cpu": generator()  # noqa: E731
        stack.enter_context(mock.patch.object(torch, "Generator", on_the_cpu))
        stack.enter_context(_Functions())
        stack.enter_context(_Dispatch())
        yield "cuda"
