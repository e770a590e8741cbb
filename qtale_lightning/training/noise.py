"""Noise of quantization in training: the weights of randomly chosen blocks are rounded in the forward pass.

After block replacement (arXiv 2412.15846): a twin of path diversity, of precisions instead of depths. In the last part
of training every step draws its blocks anew; their linears, LoRA included, compute with weights rounded to nearest,
and gradients pass as if they weren't (straight-through).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qtale_lightning.architectures import architecture_of
from qtale_lightning.models.modeling import RoutedForCausalLM
from qtale_lightning.quantization.rtn import Scheme, fake_quantize

BEGIN = 0.5  # share of the training that sees no noise; ours
SHARE = 0.5  # of the blocks, in a step; ours
GROUP = 128  # weights that share a scale, or as many of them as divide a linear's width


def noise_bits(bits: int | None, progress: float) -> int | None:
    """To how many bits a step rounds, behind ``progress`` of the training; None: not at all."""
    return bits if progress >= BEGIN else None


@contextmanager
def rounded_blocks(model: RoutedForCausalLM, bits: int | None) -> Iterator[None]:
    """Round the weights of blocks that are drawn, half of them on average, while the context is open.

    ``bits``: None rounds nothing, and draws nothing.
    """
    if bits is None:
        yield
        return
    linears, layers = architecture_of(model.config).linears, model.model.layers
    drawn = [layer for layer, chance in zip(layers, torch.rand(len(layers)), strict=True) if chance < SHARE]
    handles = [
        layer.get_submodule(name).register_forward_hook(_Rounded(bits)) for layer in drawn for name in linears
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Rounded:
    """Adds to a linear's output what rounding its weights would change."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def __call__(self, linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        with torch.no_grad():
            weight = _weight(linear)
            scheme = Scheme(self.bits, math.gcd(weight.shape[1], GROUP))
            error = (fake_quantize(weight, scheme) - weight).to(output.dtype)
        return output + nn.functional.linear(args[0].to(output.dtype), error)


def _weight(linear: Any) -> Tensor:
    """A linear's weight, with the LoRA that will be merged into it, float32."""
    if not hasattr(linear, "get_delta_weight"):
        return linear.weight.float()
    change = sum(linear.get_delta_weight(name) for name in linear.active_adapters)
    return linear.get_base_layer().weight.float() + change
