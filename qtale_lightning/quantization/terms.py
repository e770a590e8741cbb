"""Scales and zero points of nested codes' highest bits, fitted by what a window of layers gives with them.

Those that follow from the codes' own (`nested.of_highest`) stand for the middle of the codes that share their highest
bits; of what learning leaves, and of clipped ends, the middle isn't the best.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qtale_lightning.quantization.nested import narrowed
from qtale_lightning.quantization.rtn import Quantized

if TYPE_CHECKING:
    from qtale_lightning.quantization.signround import Window

RATE = 0.02  # of Adam's first step: of a scale relative to it, of a zero point in codes of the width


def fit_terms(
    window: "Window",
    bits: int,
    calls: Sequence[tuple[Tensor, dict[str, Any]]],
    wanted: Sequence[Tensor],
    shares: Sequence[Tensor],
    steps: int,
    seed: int,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Scales and zero points of each linear of a window at its codes' highest `bits`, `(out, n_groups)`, float16.

    Minimises what `signround.fit` does, by Adam, its codes as they are; the window is left with the weights that they
    give.
    """
    base = {
        name: narrowed(own.codes().quantized(own.groups.device), own.scheme.bits - bits)
        for name, own in window.roundings.items()
    }
    moves = {
        name: torch.zeros(2, *weight.scales.shape, device=weight.scales.device)
        for name, weight in base.items()
    }
    optimizer = torch.optim.Adam([*moves.values()], lr=RATE)
    generator, order = torch.Generator().manual_seed(seed), list[int]()

    def moved(name: str) -> Quantized:
        weight, (scale, zero) = base[name], moves[name]
        scales = (weight.scales * (1 + scale)).half().float()
        return Quantized(weight.codes, scales, (weight.zeros + zero).half().float())

    def write() -> None:
        for name in base:
            window.weights[name].detach().copy_(moved(name).dequantize())

    for step in range(steps):
        order = order or torch.randperm(len(wanted), generator=generator).tolist()
        i = order.pop()
        write()
        with torch.enable_grad():
            delta = window(*calls[i]).float() - wanted[i].float()
            (delta.square().sum(-1) * shares[i]).sum().backward()
        for name, weight in base.items():
            gradient = window.weights[name].grad
            window.weights[name].grad = None
            if gradient is None:  # nobody executed the layer
                moves[name].grad = None
                continue
            slope, now = gradient.float().view_as(weight.codes), moved(name)
            of_scale = (slope * (now.codes - now.zeros)).sum(-1, keepdim=True) * weight.scales
            of_zero = -slope.sum(-1, keepdim=True) * now.scales
            moves[name].grad = torch.stack([of_scale, of_zero])
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / steps)
        optimizer.step()
    write()
    found = {name: moved(name) for name in base}
    return {name: (one.scales[..., 0].half(), one.zeros[..., 0].half()) for name, one in found.items()}
