"""What an AWQ search found for one bit width, and how a model takes it on."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qtale_lightning.files import replacing
from qtale_lightning.quantization.mappings import NOT_CLIPPED, DecoderLayer, decoder_layers
from qtale_lightning.quantization.rtn import fake_quantize

FILE_FORMAT = "qtale-awq-search-1"


class OutputError(NamedTuple):
    """A linear's mean squared output error on its calibration inputs, over tokens and outputs."""

    rtn: float
    awq: float


@dataclass(frozen=True)
class AWQSearch:
    """What a search found for one bit width. Tensors are float32 on the CPU; names are full module names.

    Attributes:
        scales: by the previous operation's name, shape `(in,)` of the linears it feeds.
        clips: by the linear's name, the scaled weight's largest magnitudes, shape `(out, in / group_size)`.
        errors: by the linear's name, before (round-to-nearest) and after.
        tokens: by the decoder layer's name, the calibration tokens that executed it.
    """

    bits: int
    group_size: int
    scales: dict[str, Tensor] = field(default_factory=dict)
    clips: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, OutputError] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, atomically."""
        path = Path(path)
        tensors = {f"scales/{name}": scale for name, scale in self.scales.items()}
        tensors |= {f"clips/{name}": clip for name, clip in self.clips.items()}
        numbers = {name: getattr(self, name) for name in ("bits", "group_size", "errors", "tokens")}
        metadata = {"format": FILE_FORMAT} | {name: json.dumps(value) for name, value in numbers.items()}
        with replacing(path) as unfinished:
            save_file(tensors, unfinished, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "AWQSearch":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a search result.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no AWQ search result at {path}: run the quantize stage first")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file ({error}): run the search again") from error
        if metadata.get("format") != FILE_FORMAT:
            raise ValueError(
                f"{path} is not an AWQ search result in format {FILE_FORMAT}: run the search again"
            )
        numbers = {name: json.loads(value) for name, value in metadata.items() if name != "format"}
        numbers["errors"] = {name: OutputError(*pair) for name, pair in numbers["errors"].items()}
        scales, clips = (
            {key.removeprefix(kind): tensor for key, tensor in tensors.items() if key.startswith(kind)}
            for kind in ("scales/", "clips/")
        )
        return cls(scales=scales, clips=clips, **numbers)


@torch.no_grad()
def apply_scales(model: nn.Module, result: AWQSearch) -> None:
    """Folds the scales into the weights in place: previous operation / s, next linears' columns * s.

    Logits and the hidden states between layers don't change, beyond floating-point noise.

    Raises:
        ValueError: the result is of another model.
    """
    _rewrite(model, result, lambda name, weight: weight)


@torch.no_grad()
def apply(model: nn.Module, result: AWQSearch) -> None:
    """Scales, clips and fake-quantizes the decoder layers' linears in place.

    All arithmetic is in float32; the weights keep their dtype. Apply one result to a model only once.

    Raises:
        ValueError: the result is of another model.
    """

    def quantized(name: str, weight: Tensor) -> Tensor:
        return fake_quantize(clip_weight(weight, result.clips.get(name)), result.bits, result.group_size)

    _rewrite(model, result, quantized)


def _rewrite(model: nn.Module, result: AWQSearch, finish: Callable[[str, Tensor], Tensor]) -> None:
    """Folds the scales in; `finish` turns a linear's name and scaled float32 weight into the one to store."""
    _check_result(model, result)
    for layer in decoder_layers(model):
        for name, linear in layer.linears.items():
            linear.weight.copy_(finish(layer.path(name), scaled_weight(layer, name, result.scales)))
        for mapping in layer.scaled_mappings():
            scale = result.scales[layer.path(mapping.previous)]
            for parameter in layer.module.get_submodule(mapping.previous).parameters(recurse=False):
                if parameter.dim() == 1:  # a norm's weight, or a bias: `scaled_weight` did the linears' rows
                    parameter.div_(scale.to(parameter.device))


def scaled_weight(layer: DecoderLayer, name: str, scales: dict[str, Tensor]) -> Tensor:
    """A linear's weight with its scales folded in, shape `(out, in)`, float32.

    Columns are multiplied by the scales of the linear's own input, rows divided by those of the input that it
    feeds.
    """
    weight = layer.linears[name].weight.float()
    for mapping in layer.scaled_mappings():
        scale = scales[layer.path(mapping.previous)].to(weight.device)
        if name in mapping.linears:
            weight = weight * scale
        if name == mapping.previous:
            weight = weight / scale[:, None]
    return weight


def clip_weight(weight: Tensor, limit: Tensor | None) -> Tensor:
    """Clamps a weight's groups to their limits: shapes `(out, in)`, `(out, n_groups)`; None clips nothing."""
    if limit is None:
        return weight
    limit = limit.to(weight.device)[..., None]
    return weight.unflatten(-1, (limit.shape[1], -1)).clamp(-limit, limit).flatten(-2)


def _check_result(model: nn.Module, result: AWQSearch) -> None:
    """Raises ValueError where the result's names or shapes aren't those of the model."""
    expected: dict[str, tuple[int, ...]] = {}
    for layer in decoder_layers(model):
        for mapping in layer.scaled_mappings():
            width = layer.linears[mapping.linears[0]].in_features
            expected[f"scales of {layer.path(mapping.previous)}"] = (width,)
        for name, linear in layer.linears.items():
            if name not in NOT_CLIPPED:
                shape = (linear.out_features, linear.in_features // result.group_size)
                expected[f"clips of {layer.path(name)}"] = shape
    found = {f"scales of {name}": tuple(scale.shape) for name, scale in result.scales.items()}
    found |= {f"clips of {name}": tuple(clip.shape) for name, clip in result.clips.items()}
    for what in sorted(expected.keys() | found.keys()):
        if expected.get(what) != found.get(what):
            raise ValueError(
                f"the AWQ result is of another model: the shape of the {what} is {found.get(what)}, this "
                f"model needs {expected.get(what)}; search again"
            )
