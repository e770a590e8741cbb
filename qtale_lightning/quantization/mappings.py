"""What AWQ scales together in a LLaMA-family decoder layer, and where those linears are in a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # what is planned and checked doesn't wait for it
    from torch import Tensor, nn


class ScaleMapping(NamedTuple):
    """Linears that read one input, and the operation before them that their scales are folded into."""

    previous: str
    linears: tuple[str, ...]


# Routers, embeddings and `lm_head` are not here: they stay in full precision.
MAPPINGS = (
    ScaleMapping("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ScaleMapping("self_attn.v_proj", ("self_attn.o_proj",)),
    ScaleMapping("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ScaleMapping("mlp.up_proj", ("mlp.down_proj",)),
)
LINEARS = tuple(linear for mapping in MAPPINGS for linear in mapping.linears)
NOT_CLIPPED = ("self_attn.q_proj", "self_attn.k_proj")  # their product forms the scores: clips don't add up


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer: its full name, its module, and its seven linears by their names in `LINEARS`."""

    name: str
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
            for mapping in MAPPINGS
            if mapping.previous not in self.linears
            or self.linears[mapping.previous].out_features == self.linears[mapping.linears[0]].in_features
        ]

    def scaled_columns(self, name: str, scales: dict[str, Tensor]) -> Tensor:
        """A linear's weight for scaled inputs, shape `(out, in)`, float32: its columns times their scales.

        Args:
            scales: by the full name of the operation before.
        """
        weight = self.linears[name].weight.detach().float()
        mapping = next(mapping for mapping in MAPPINGS if name in mapping.linears)
        scale = scales.get(self.path(mapping.previous))
        return weight if scale is None else weight * scale.to(weight.device)


def split_name(linear: str) -> tuple[str, ScaleMapping]:
    """The decoder layer of a linear, both by full name, and the mapping that scales its input."""
    layer, block, name = linear.rsplit(".", 2)
    return layer, next(mapping for mapping in MAPPINGS if f"{block}.{name}" in mapping.linears)


def decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """Finds a model's decoder layers (`model.layers`).

    Raises:
        ValueError: the model isn't of the LLaMA family, its LoRA weights are not merged, or it is quantized.
    """
    from torch import nn  # here, so that the names of linears can be had without it

    modules = dict(model.named_modules())
    if "model.layers" not in modules:
        raise ValueError(f"{type(model).__name__} has no model.layers: AWQ needs a LLaMA-family model")
    layers = []
    for index, module in modules["model.layers"].named_children():
        layer = DecoderLayer(f"model.layers.{index}", module, {})
        for name in LINEARS:
            linear = modules.get(layer.path(name))
            if type(linear).__name__ == "QuantizedLinear":
                raise ValueError(
                    f"{layer.path(name)} is quantized already: quantize the full-precision model instead"
                )
            if not isinstance(linear, nn.Linear):
                found = "missing" if linear is None else f"a {type(linear).__name__}"
                raise ValueError(
                    f"{layer.path(name)} must be an nn.Linear, is {found}: AWQ needs a LLaMA-family model in "
                    "full precision with LoRA merged"
                )
            layer.linears[name] = linear
        layers.append(layer)
    return layers


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Weight shapes `(out, in)` of what is quantized, by full names: seven linears in each decoder layer."""
    return {
        layer.path(name): (layer.linears[name].out_features, layer.linears[name].in_features)
        for layer in decoder_layers(model)
        for name in LINEARS
    }
