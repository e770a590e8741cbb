"""AWQ's search by AutoAWQ 0.2.9's own functions, the reference for the suite's own (`awq.py`).

AutoAWQ's quantizer changes the weights of the model that it searches. Here its functions get copies, one block at
a time, and its findings become a recipe. Each layer's search is that of its `quantize()`: scales of all
mappings on the unscaled weights, then clips on the scaled ones.

What it needs beyond that one: memory for the inputs of a layer's linears, and 20 runs of the layer at each precision.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qtale_lightning.architectures import Architecture
from qtale_lightning.quantization.calibration import plain_float32
from qtale_lightning.quantization.errors import output_errors
from qtale_lightning.quantization.mappings import DecoderLayer
from qtale_lightning.quantization.recipe import CLIP_STEP, Recipe
from qtale_lightning.quantization.replay import Call, Replay, flat
from qtale_lightning.quantization.rtn import Scheme
from qtale_lightning.quantization.search import Observed, Search

OUTPUT_CHUNK = 64  # AutoAWQ's clip search takes outputs in multiples of this only


@cache
def quantizer_class() -> Any:
    """AutoAWQ's `AwqQuantizer`, imported when first needed: the import takes seconds.

    Raises:
        ImportError: the package isn't installed, or can't be imported.
    """
    # The package puts its own warning filter before all others, so that its farewell can only be caught.
    with warnings.catch_warnings(record=True) as caught:
        try:
            from awq.quantize.quantizer import AwqQuantizer
        except ImportError as error:
            raise ImportError(
                f"AutoAWQ's search needs the package autoawq ({error}): pip install autoawq==0.2.9, or choose "
                "another engine (--quantize.engine)"
            ) from error
    for warning in caught:
        if "AutoAWQ is officially deprecated" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return AwqQuantizer


def make_quantizer(scheme: Scheme) -> Any:
    """AutoAWQ's quantizer with all that its search functions read, and their defaults.

    Its constructor would load a calibration set and run the model on it.
    """
    quantizer = object.__new__(quantizer_class())
    quantizer.w_bit, quantizer.group_size = scheme.bits, scheme.group_size
    quantizer.zero_point = not scheme.symmetric
    quantizer.duo_scaling = True
    quantizer.n_parallel_calib_samples = None
    quantizer.max_chunk_memory = 1024**3
    return quantizer


class _Replay(Replay):
    """A replay that AutoAWQ can restore."""

    def __init__(self, module: nn.Module, calls: Sequence[Call]) -> None:
        super().__init__(module, calls)
        # AutoAWQ backs weights up by `.cpu()`, which copies nothing where they are there already: every candidate
        # would be tried on what the one before it left.
        self.register_state_dict_post_hook(
            lambda module, state, prefix, metadata: state.update({k: w.clone() for k, w in state.items()})
        )


def _search_layer(layer: DecoderLayer, seen: Observed, recipe: Recipe) -> None:
    """Searches one decoder layer at the recipe's bits and writes what it finds into the recipe."""
    inputs = {name: flat(args[0] for args, _ in seen.calls[name]) for name in seen.moments}
    _search_scales(layer, seen, inputs, recipe)
    with plain_float32(layer.linears[layer.architecture.linears[0]].weight):
        _search_clips(layer, inputs, recipe)
        recipe.errors.update(output_errors(layer, seen.moments, recipe))


# Autocast is left as it is: the block must run as it ran in calibration.
@torch.inference_mode(False)
@torch.no_grad()
def _search_scales(layer: DecoderLayer, seen: Observed, inputs: dict[str, Tensor], recipe: Recipe) -> None:
    """Writes the scales of a layer's mappings into the recipe."""
    for mapping in layer.scaled_mappings():
        first, inspected = mapping.linears[0], mapping.inspected
        replay = _Replay(layer.module.get_submodule(inspected), seen.calls[inspected])
        linears = [
            replay.module.get_submodule(name.removeprefix(inspected).lstrip(".")) for name in mapping.linears
        ]
        scheme = recipe.scheme(layer.path(first))
        try:
            # It reads only the names of its first two arguments, and they aren't needed.
            _, _, scale = make_quantizer(scheme)._search_best_scale(
                replay, replay, linears, inputs[first], replay
            )
        except Exception as error:
            # AutoAWQ raises a bare Exception where no loss is finite, and asserts that there is no NaN.
            if type(error) not in (Exception, AssertionError):
                raise
            raise ValueError(
                f"{layer.name}, {', '.join(mapping.linears)} at {scheme.bits} bits: no AWQ scale has a finite "
                "output error: its weights or activations are too large"
            ) from error
        recipe.scales[layer.path(mapping.previous)] = scale.float()


def _search_clips(layer: DecoderLayer, inputs: dict[str, Tensor], recipe: Recipe) -> None:
    """Writes the clips of a layer's linears into the recipe, given its scales."""
    for mapping in layer.architecture.mappings:
        tokens = inputs[mapping.linears[0]].float()
        if (columns := recipe.scales.get(layer.path(mapping.previous))) is not None:
            tokens = tokens / columns.to(tokens.device)
        for name in mapping.linears:
            if name not in layer.architecture.not_clipped:
                full = layer.path(name)
                weight = layer.scaled_columns(name, recipe.scales)
                quantizer = make_quantizer(recipe.scheme(full))
                recipe.clips[full] = clip_steps(quantizer, weight, tokens).cpu()


def clip_steps(quantizer: Any, weight: Tensor, inputs: Tensor) -> Tensor:
    """AutoAWQ's clips of a weight as steps of `CLIP_STEP`.

    Args:
        weight: shape `(out, in)`, float32, scaled.
        inputs: shape `(tokens, in)`, float32, scaled.

    Returns:
        Shape `(out, in / group_size)`, uint8.
    """
    padded = nn.functional.pad(weight, (0, 0, 0, -len(weight) % OUTPUT_CHUNK))
    limits = quantizer._compute_best_clip(padded, inputs)[: len(weight)].squeeze(-1)
    peaks = weight.unflatten(-1, (-1, quantizer.group_size)).abs().amax(-1)
    steps = (1 - limits / peaks) / CLIP_STEP
    return steps.where(peaks > 0, 0).round().to(torch.uint8)


def _recorded(architecture: Architecture) -> list[str]:
    """How the inspected modules are called, and the first linear that reads each input."""
    inspected = [mapping.inspected for mapping in architecture.mappings]
    return [*dict.fromkeys([*inspected, *(mapping.linears[0] for mapping in architecture.mappings)])]


search = Search(_search_layer, _recorded)
"""AutoAWQ's scales and clips for every precision."""
