"""A recipe: what an engine's search found for one precision, and how a model takes it on."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qtale_lightning.architectures import architecture_of
from qtale_lightning.manifest import DamagedFileError
from qtale_lightning.quantization.mappings import DecoderLayer, decoder_layers, split_name
from qtale_lightning.quantization.rtn import Quantized, Scheme, quantize

FILE_FORMAT = "qtale-quantization-4"
REMEDY = "remove it: `python -m qtale_lightning quantize <run>` searches again"
CLIP_STEP = 1 / 20  # of a group's largest magnitude: a clip of k leaves (1 - k/20) of it


class Codes(NamedTuple):
    """A linear's own codes, shape `(out, in)`, uint8, and its groups' scales and zero points, `(out, in / group_size)`,
    float32 and uint8."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def cpu(self) -> "Codes":
        """On the CPU."""
        return Codes(*(part.cpu() for part in self))

    def rows(self, first: int, last: int) -> "Codes":
        """Those of some outputs."""
        return Codes(*(part[first:last] for part in self))

    def quantized(self, device: torch.device | str = "cpu") -> Quantized:
        """As what is packed and run takes them, on a device."""
        codes, scales, zeros = (part.to(device).float() for part in self)
        return Quantized(codes.unflatten(1, (scales.shape[1], -1)), scales[..., None], zeros[..., None])


@dataclass(frozen=True)
class Recipe:
    """What a search found for one precision. Tensors lie on the CPU; names are full module names.

    Attributes:
        engine: that searched.
        bits: by the linear's name.
        family: `model_type` of the model's architecture.
        scales: by the previous operation's name, shape `(in,)` of the linears it feeds, float32. Round-to-nearest
            has none.
        clips: by the linear's name, steps of `CLIP_STEP` by which a group's largest magnitude shrinks before it is
            rounded, shape `(out, in / group_size)`, uint8. They refer to the weight with scaled columns; rows may
            be scaled afterwards, since that scales a group as a whole.
        codes: by the linear's name, of engines whose codes no rounding of the weight gives: with them there are no
            clips, and scales of what feeds the linear are part of them.
        errors: by the linear's name, the mean squared error of its unscaled outputs on its calibration inputs, over
            tokens and outputs.
        damage: by the name of the operation before, what rounding the linears that it feeds does to the residual
            stream: the mean over tokens of the squared change of their block's output over the squared stream. Of
            engines that spend an average of bits by it.
        tokens: by the decoder layer's name, the calibration tokens that executed it.
        made_from: the model, the calibration sequences and the options that were searched with.
        held: rising widths at which the codes' highest bits are models, too, `bits` the last of them; see
            `quantization.nested`. Empty: there is one at `bits` alone.
        terms: by the narrower ones of these and the linear's name, scales and zero points of its codes' highest bits,
            `(out, in / group_size)`, float16; where there are none, they follow from the codes' own.
    """

    engine: str
    bits: dict[str, int]
    group_size: int
    symmetric: bool = False
    family: str = "llama"
    scales: dict[str, Tensor] = field(default_factory=dict)
    clips: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, Codes] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    damage: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    made_from: dict[str, Any] = field(default_factory=dict)
    held: list[int] = field(default_factory=list)
    terms: dict[int, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def scheme(self, name: str) -> Scheme:
        """How the linear of a full name is rounded."""
        return Scheme(self.bits[name], self.group_size, self.symmetric)

    @classmethod
    def compose(cls, parts: Mapping[str, "Recipe"]) -> "Recipe":
        """A recipe that takes each linear, with the scales of its input, from another one.

        Args:
            parts: by linear; linears that share an input must come from the same recipe.
        """
        one = next(iter(parts.values()))
        whole = cls(one.engine, {}, one.group_size, one.symmetric, one.family, tokens=one.tokens)
        for name, part in parts.items():
            whole.bits[name] = part.bits[name]
            if name in part.errors:
                whole.errors[name] = part.errors[name]
            if name in part.clips:
                whole.clips[name] = part.clips[name]
            if name in part.codes:
                whole.codes[name] = part.codes[name]
            layer, mapping = split_name(name, architecture_of(one.family))
            previous = f"{layer}.{mapping.previous}"
            if previous in part.scales:
                whole.scales[previous] = part.scales[previous]
            if previous in part.damage:
                whole.damage[previous] = part.damage[previous]
        return whole

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file."""
        tensors = {f"scales/{name}": scale for name, scale in self.scales.items()}
        tensors |= {f"clips/{name}": clip for name, clip in self.clips.items()}
        for name, own in self.codes.items():
            tensors |= {f"{kind}{name}": part.contiguous() for kind, part in zip(_CODES, own, strict=True)}
        for width, by_name in self.terms.items():
            for name, pair in by_name.items():
                tensors |= {
                    f"{kind}{width}/{name}": part.contiguous()
                    for kind, part in zip(_TERMS, pair, strict=True)
                }
        plain = {name: getattr(self, name) for name in (*_PLAIN, *_LATER)}
        metadata = {"format": FILE_FORMAT} | {name: json.dumps(value) for name, value in plain.items()}
        save_file(tensors, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            DamagedFileError: the file is not a recipe.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no quantization recipe at {path}: run the quantize stage first")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            tensors = load_file(path)
        except SafetensorError as error:
            raise DamagedFileError(f"{path} is not a safetensors file ({error}): {REMEDY}") from error
        if metadata.get("format") != FILE_FORMAT:
            raise DamagedFileError(f"{path} is not a recipe in format {FILE_FORMAT}: {REMEDY}")
        try:
            plain = {name: json.loads(metadata[name]) for name in _PLAIN}
            for name, unsaid in _LATER.items():
                plain[name] = json.loads(metadata.get(name, json.dumps(unsaid)))
        except (KeyError, ValueError) as error:
            raise DamagedFileError(f"the metadata of {path} isn't a recipe's ({error}): {REMEDY}") from error
        scales, clips, *own = (
            {key.removeprefix(kind): tensor for key, tensor in tensors.items() if key.startswith(kind)}
            for kind in ("scales/", "clips/", *_CODES)
        )
        codes = {name: Codes(*(part[name] for part in own)) for name in own[0]}
        terms: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind.startswith(_TERMS[0]):
                width = kind.removeprefix(_TERMS[0])
                terms.setdefault(int(width), {})[name] = tensor, tensors[f"{_TERMS[1]}{width}/{name}"]
        return cls(scales=scales, clips=clips, codes=codes, terms=terms, **plain)


_CODES = ("codes/", "code scales/", "code zeros/")
_TERMS = ("narrower scales ", "narrower zeros ")
_PLAIN = ("engine", "bits", "group_size", "symmetric", "errors", "damage", "tokens")
# What older files don't say, and what it was.
_LATER: dict[str, Any] = {"made_from": {}, "family": "llama", "held": []}


def round_to_nearest(
    bits: dict[str, int], group_size: int, symmetric: bool = False, family: str = "llama"
) -> Recipe:
    """The baseline: no scales, no clips, nothing to calibrate."""
    return Recipe("", bits, group_size, symmetric, family)


def clip_weight(weight: Tensor, steps: Tensor | None) -> Tensor:
    """Clamps a weight's groups: shapes `(out, in)`, `(out, n_groups)`; None clips nothing."""
    if steps is None:
        return weight
    groups = weight.unflatten(-1, (steps.shape[1], -1))
    limit = clip_limit(groups.abs().amax(-1, keepdim=True), steps.to(weight.device)[..., None])
    return groups.clamp(-limit, limit).flatten(-2)


def clip_limit(peak: Tensor, steps: Tensor) -> Tensor:
    """What a clip leaves of a group's largest magnitude, as AutoAWQ computes it, whose factors are Python floats.

    Where a clip cuts both ends of a group, the zero point lies half-way between two codes and a last bit decides:
    the search and what is applied must agree in it.
    """
    return peak * (1 - steps.double() * CLIP_STEP).to(peak.dtype)


def quantized_weight(layer: DecoderLayer, name: str, recipe: Recipe) -> Quantized:
    """A linear's codes, scales and zero points under a recipe: its own codes, or columns scaled, clipped, rounded, rows
    scaled back."""
    full = layer.path(name)
    if full in recipe.codes:
        return recipe.codes[full].quantized(layer.linears[name].weight.device)
    clipped = clip_weight(layer.scaled_columns(name, recipe.scales), recipe.clips.get(full))
    codes, scales, zeros = quantize(clipped, recipe.scheme(full))
    rows = recipe.scales.get(full)  # the linear is the operation before another one
    return Quantized(codes, scales if rows is None else scales / rows.to(scales)[:, None, None], zeros)


def quantized_layer(
    layer: DecoderLayer, recipe: Recipe, fitted: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A copy of a layer with the values that its quantized weights stand for.

    Args:
        fitted: other parameters that fit the recipe, by full name; those of other layers are left out.
    """
    module, prefix = copy.deepcopy(layer.module), f"{layer.name}."
    with torch.no_grad():
        for name, parameter in (fitted or {}).items():
            if name.startswith(prefix):
                module.get_parameter(name.removeprefix(prefix)).copy_(parameter)
        for name in layer.linears:
            weight = quantized_weight(layer, name, recipe).dequantize()
            module.get_parameter(f"{name}.weight").copy_(weight)
    scale_vectors(replace(layer, module=module), recipe)
    return module


@torch.no_grad()
def apply_scales(model: nn.Module, recipe: Recipe) -> None:
    """Folds the scales into the weights in place: previous operation / s, next linears' columns * s.

    Logits and the hidden states between layers don't change, beyond floating-point noise.

    Raises:
        ValueError: the recipe is of another model.
    """
    check_recipe(model, recipe)
    for layer in decoder_layers(model):
        for name, linear in layer.linears.items():
            linear.weight.copy_(layer.scaled_weight(name, recipe.scales))
        scale_vectors(layer, recipe)


@torch.no_grad()
def scale_vectors(layer: DecoderLayer, recipe: Recipe) -> None:
    """Divides norms' weights and linears' biases by the scales of what they feed, in place."""
    for mapping in layer.scaled_mappings():
        scale = recipe.scales.get(layer.path(mapping.previous))
        offset = 0.0 if mapping.previous in layer.linears else layer.architecture.norm_offset
        for parameter in layer.module.get_submodule(mapping.previous).parameters(recurse=False):
            if scale is not None and parameter.dim() == 1:
                scaled = (parameter.float() + offset) / scale.to(parameter.device) - offset
                parameter.copy_(scaled)


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Raises ValueError where the recipe's names or shapes aren't those of the model."""
    searched = bool(recipe.scales)
    expected: dict[str, tuple[int, ...]] = {}
    for layer in decoder_layers(model):
        for mapping in layer.scaled_mappings() if searched else []:
            width = layer.linears[mapping.linears[0]].in_features
            expected[f"scales of {layer.path(mapping.previous)}"] = (width,)
        for name, linear in layer.linears.items():
            expected[f"bits of {layer.path(name)}"] = ()
            if recipe.codes:
                shape = (linear.out_features, linear.in_features)
                expected[f"codes of {layer.path(name)}"] = shape
            elif searched and name not in layer.architecture.not_clipped:
                shape = (linear.out_features, linear.in_features // recipe.group_size)
                expected[f"clips of {layer.path(name)}"] = shape
    found: dict[str, tuple[int, ...]] = {f"bits of {name}": () for name in recipe.bits}
    found |= {f"scales of {name}": tuple(scale.shape) for name, scale in recipe.scales.items()}
    found |= {f"clips of {name}": tuple(clip.shape) for name, clip in recipe.clips.items()}
    found |= {f"codes of {name}": tuple(own.codes.shape) for name, own in recipe.codes.items()}
    for what in sorted(expected.keys() | found.keys()):
        if expected.get(what) != found.get(what):
            raise ValueError(
                f"the recipe is of another model: the shape of the {what} is {found.get(what)}, this "
                f"model needs {expected.get(what)}; search again"
            )
