"""Operations of decoding on a GPU, in Triton: a step of them can be captured as one CUDA graph, `models.graph`.

They are an addition: where `available` says no, models run by PyTorch's operations. What a model computes is defined in
`models.routed_layer`; here it is computed by kernels that read a layer's weights only where a sequence executes it.

Modules beside this one need the package `triton`; this one doesn't.
"""

import os
from importlib.util import find_spec

import torch

from qtale_lightning.compat.kernels import has_bfloat16_kernels


def available(device: torch.device) -> bool:
    """Whether a device can run these: a GPU of compute capability 8.0 or more, with Triton.

    Not with ``QTALE_CUDA_KERNELS=0``.
    """
    wanted = os.environ.get("QTALE_CUDA_KERNELS", "1") != "0"
    return wanted and has_bfloat16_kernels(device) and find_spec("triton") is not None
