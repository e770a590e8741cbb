"""What transformers loaded, checked where its older versions don't."""

from collections.abc import Mapping

import torch
from torch import nn


def misshaped(model: nn.Module) -> list[str]:
    """Tensors of a quantized model that were loaded in another shape than it was made with.

    transformers 5.17 compares no shapes where there is a quantizer, and takes what comes. The quantizer keeps them in
    its `shapes`, by name.
    """
    expected: Mapping[str, torch.Size] = getattr(getattr(model, "hf_quantizer", None), "shapes", {})
    return [n for n, tensor in model.state_dict().items() if tensor.shape != expected.get(n, tensor.shape)]
