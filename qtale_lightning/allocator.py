"""Keeps freed memory in the process: a forward pass frees and allocates gigabytes of activations again and again."""

import ctypes
import gc
import logging
import sys

log = logging.getLogger(__name__)

# glibc's mallopt parameters (malloc.h).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def give_back() -> None:
    """Hands memory that is free now back to the system: where a model is given up, or moved elsewhere.

    What is kept otherwise (:func:`keep_freed_memory`) would stay beside the next model.
    """
    gc.collect()  # modules refer to each other in circles
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def keep_freed_memory() -> bool:
    """Tells glibc not to hand freed memory back to the system; returns whether it could.

    By default it does so for every large tensor, and the next one is faulted in page by page, which can cost more
    time than computing it, most of all on virtual machines. Memory that PyTorch frees is reused by PyTorch; only other
    processes don't get it back before this one ends, or calls :func:`give_back`.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is None:
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26))
    done = all(mallopt(ctypes.c_int(name), ctypes.c_int(value)) == 1 for name, value in settings)
    if not done:
        log.warning("glibc refused mallopt: large tensors may be faulted in again and again")
    return done
