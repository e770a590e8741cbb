"""What rounding does to the residual stream where a block's output goes through a norm before it joins the stream."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qtale_lightning.architectures import ScaleMapping
from qtale_lightning.quantization.mappings import DecoderLayer
from qtale_lightning.quantization.recipe import Recipe, clip_weight
from qtale_lightning.quantization.replay import Call, Replay
from qtale_lightning.quantization.rtn import fake_quantize


# Autocast is left as it is: a block must run as it ran in calibration.
@torch.inference_mode(False)
@torch.no_grad()
def damage_behind(
    layer: DecoderLayer,
    calls: Sequence[Call],
    residuals: Sequence[Tensor],
    recipe: Recipe,
    mapping: ScaleMapping,
    norm: str,
) -> float:
    """The mean over tokens of the squared change behind the norm over the squared stream (`Recipe.damage`).

    The norm takes the output's size away: an error counts by its share of the output, and by the norm's weights, not by
    its own size.

    Args:
        calls: Of the mapping's block, in calibration.
        residuals: The stream in front of the block, in each call, shape `(…, D)`.
        recipe: How the mapping's linears are rounded; all others stay as they are.
        norm: Name in the layer of the norm behind the block.
    """
    inside = {name: name.removeprefix(f"{mapping.block}.") for name in mapping.linears}
    replay = Replay(layer.module.get_submodule(mapping.block), calls, changed=inside.values())
    behind = layer.module.get_submodule(norm)
    exact = [behind(output).float() for output in replay.outputs()]
    for name, own in inside.items():
        full, weight = layer.path(name), layer.linears[name].weight.float()
        scale = recipe.scales.get(layer.path(mapping.previous), torch.ones(())).to(weight)
        clipped = clip_weight(weight * scale, recipe.clips.get(full))
        replay.module.get_submodule(own).get_parameter("weight").copy_(
            fake_quantize(clipped, recipe.scheme(full)) / scale
        )
    shares = [
        (behind(found).float() - kept).square().sum(-1) / h.float().square().sum(-1).clamp(min=1e-12)
        for found, kept, h in zip(replay.outputs(), exact, residuals, strict=True)
    ]
    return torch.cat([share.flatten() for share in shares]).mean().item()
