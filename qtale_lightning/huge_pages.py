"""Weights in huge pages: what decoding reads from end to end at every token, memory then gives faster.

A page has 4 KB, processors don't fetch ahead across its end, and virtual machines look each up twice. In pages of 2 MB
one thread read 37 GB/s where it had read 17 (benchmarks/README.md, a decoded token). Linux gives them to memory that
asks for them; where it doesn't, or has none, everything works as before.
"""

import contextlib
import mmap
from typing import Any

import torch
from torch import Tensor

from qtale_lightning.allocator import give_back

SIZE = 2**21
"""Bytes of one, on x86, and on ARM with pages of 4 KB."""

_CHUNK, _LINE = 8 * SIZE, 64  # what tensors share, and at whose multiples they begin: a line of the caches
_MANY = 2**29
_left: Tensor | None = None  # of the last chunk
_moved = 0  # bytes since memory was given back


def placed(tensor: Tensor) -> Tensor:
    """A contiguous copy in huge pages; on other devices and systems, the tensor, made contiguous."""
    if not tensor.is_cpu or not hasattr(mmap, "MADV_HUGEPAGE"):
        return tensor.contiguous()
    room = _room(tensor.numel() * tensor.element_size())
    with torch.no_grad():
        copy = room.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    _give_back(copy.numel() * copy.element_size())
    return copy


def settle(parameter: Tensor) -> None:
    """Move a parameter's data into huge pages, unless others see its memory, too: views of it, or other processes."""
    # In inference mode its data would be made for that alone, and nothing could be trained behind it.
    with torch.inference_mode(False):
        data = parameter.detach()
        alone = data.untyped_storage().nbytes() == data.numel() * data.element_size()
        if type(data) is Tensor and alone and not data.is_shared() and not data.is_inference():
            parameter.data = placed(data)


def _give_back(count: int) -> None:
    """Have the system take back what was moved, every now and then: else a large model would be in memory twice."""
    global _moved
    _moved += count
    if _moved >= _MANY:
        _moved = 0
        give_back()


def _room(count: int) -> Tensor:
    """Bytes ``(count,)`` behind those that were asked for before, so that weights lie in the order of their use."""
    global _left
    taken = -(-count // _LINE) * _LINE
    if _left is None or len(_left) < taken:
        # Memory that was never written to, since what was has small pages already.
        memory: Any = mmap.mmap(-1, max(taken, _CHUNK) + SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        with torch.inference_mode(False):
            whole = torch.frombuffer(memory, dtype=torch.uint8)
            _left = whole[-whole.data_ptr() % SIZE :]
    with torch.inference_mode(False):
        room, _left = _left[:count], _left[taken:]
    return room
