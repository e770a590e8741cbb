"""Where a model's quantized linears are, and what AWQ scales together among them, as its family declares it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtale_lightning.architectures import Architecture, ScaleMapping, architecture_of

if TYPE_CHECKING:  # what is planned and checked doesn't wait for it
    from torch import Tensor, nn


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer: its full name, its family, its module, and what is quantized of it by names in the layer."""

    name: str
    architecture: Architecture
    module: nn.Module
    linears: dict[str, nn.Linear]

    def path(self, name: str) -> str:
        """The full name of a module in this layer."""
        return f"{self.name}.{name}"

    def scaled_mappings(self) -> list[ScaleMapping]:
        """The mappings whose scales can be folded.

        v → o is one only where v's outputs are o's inputs one to one: not in grouped-query attention.
        """
        return [
            mapping
            for mapping in self.architecture.mappings
            if mapping.previous not in self.linears
            or self.linears[mapping.previous].out_features == self.linears[mapping.linears[0]].in_features
        ]

    def scaled_columns(self, name: str, scales: dict[str, Tensor]) -> Tensor:
        """A linear's weight for scaled inputs, shape `(out, in)`, float32: its columns times their scales.

        Args:
            scales: by the full name of the operation before.
        """
        weight = self.linears[name].weight.detach().float()
        scale = scales.get(self.path(self.architecture.mapping(name).previous))
        return weight if scale is None else weight * scale.to(weight.device)

    def scaled_weight(self, name: str, scales: dict[str, Tensor]) -> Tensor:
        """The same with rows divided by the scales of what the linear feeds, where it is the operation before."""
        weight, rows = self.scaled_columns(name, scales), scales.get(self.path(name))
        return weight if rows is None else weight / rows.to(weight.device)[:, None]


def split_name(linear: str, architecture: Architecture) -> tuple[str, ScaleMapping]:
    """The decoder layer of a linear, both by full name, and the mapping that scales its input."""
    layer, block, name = linear.rsplit(".", 2)
    return layer, architecture.mapping(f"{block}.{name}")


def decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """Finds a model's decoder layers (`model.layers`).

    Raises:
        ValueError: the model's family isn't declared, its LoRA weights are not merged, or it is quantized.
    """
    from torch import nn  # here, so that the names of linears can be had without it

    modules = dict(model.named_modules())
    if "model.layers" not in modules:
        raise ValueError(
            f"{type(model).__name__} has no model.layers: AWQ needs a decoder-only language model"
        )
    architecture, layers = architecture_of(getattr(model, "config", None)), []
    for index, module in modules["model.layers"].named_children():
        layer = DecoderLayer(f"model.layers.{index}", architecture, module, {})
        for name in architecture.linears:
            linear = modules.get(layer.path(name))
            if type(linear).__name__ == "QuantizedLinear":
                raise ValueError(
                    f"{layer.path(name)} is quantized already: quantize the full-precision model instead"
                )
            if not isinstance(linear, nn.Linear):
                found = "missing" if linear is None else f"a {type(linear).__name__}"
                raise ValueError(
                    f"{layer.path(name)} must be an nn.Linear, is {found}: AWQ needs a model in full precision with "
                    "LoRA merged"
                )
            layer.linears[name] = linear
        layers.append(layer)
    return layers


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Weight shapes `(out, in)` of what is quantized, by full names: the linears of each decoder layer."""
    return {
        layer.path(name): (linear.out_features, linear.in_features)
        for layer in decoder_layers(model)
        for name, linear in layer.linears.items()
    }
