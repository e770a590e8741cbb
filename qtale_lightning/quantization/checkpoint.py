"""Quantized models as transformers loads and saves them: `from_pretrained` on a packed folder runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qtale_lightning.quantization.linear import PLANE, TERMS, Layout, QuantizedLinear
from qtale_lightning.quantization.mappings import decoder_layers
from qtale_lightning.quantization.recipe import Recipe, check_recipe, quantized_weight, scale_vectors
from qtale_lightning.quantization.rtn import check_quantizable

METHOD = "qtale"


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed folder.

    Four bits everywhere with zero points are AutoAWQ's GEMM format, and say so (`quant_method` awq), so that
    AWQ-aware tools read them; all else is this project's tight layout.

    Args:
        bits: of a code, one for all linears or by full name.
        group_size: inputs that share a scale.
        zero_point: levels are asymmetric.
        engine: that searched the scales and clips, for the record.
        refit_norm: whether the final norm was fitted to them, for the record.
        made_from: the model, the calibration sequences and all options that the folder was made from.
        held: rising widths of which the folder holds a model each, `bits` the last of them; empty: `bits` alone.
        read: the one of them that is loaded; by default all are, to be switched between, from `bits` on.

    Raises:
        ValueError: nothing is held at the precision that is to be read.
    """

    def __init__(
        self,
        bits: int | Mapping[str, int],
        group_size: int,
        zero_point: bool = True,
        engine: str | None = None,
        refit_norm: bool = False,
        made_from: Mapping[str, Any] | None = None,
        held: Sequence[int] = (),
        read: int | None = None,
        **_: Any,  # what AWQ's own format says besides
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # an enumeration of transformers' own methods
        self.bits = bits if isinstance(bits, int) else dict(bits)
        self.group_size, self.zero_point = group_size, zero_point
        self.engine, self.refit_norm = engine, refit_norm
        self.made_from = made_from
        self.held, self.read = [*held], read
        there: Sequence[Any] = self.held or [self.bits]
        if read not in (None, *there):
            said = ", ".join(map(str, there)) if isinstance(self.bits, int) else "several widths, mixed"
            raise ValueError(
                f"the folder holds no model at {read} bits, but at {said}: leave `bits` out, or quantize by an engine "
                "whose codes are nested (--quantize.engine nested)"
            )

    @classmethod
    def of(
        cls, recipe: Recipe, refit_norm: bool = False, made_from: Mapping[str, Any] | None = None
    ) -> "PackedConfig":
        """The configuration of a model under a recipe."""
        widths = set(recipe.bits.values())
        bits = widths.pop() if len(widths) == 1 else recipe.bits
        zero_point, held = not recipe.symmetric, recipe.held
        return cls(bits, recipe.group_size, zero_point, recipe.engine, refit_norm, made_from, held)

    @property
    def layout(self) -> Layout:
        """How the codes are stored."""
        return "gemm" if self.bits == 4 and self.zero_point and not self.held else "tight"

    def bits_of(self, name: str) -> int:
        """Bits of the linear of a full name.

        Raises:
            ValueError: the configuration doesn't name it.
        """
        if isinstance(self.bits, int):
            return self.bits
        if name not in self.bits:
            raise ValueError(f"quantization_config gives no bits for {name}: config.json isn't of this model")
        return self.bits[name]

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        known: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size}
        known |= {"zero_point": self.zero_point, "engine": self.engine, "refit_norm": self.refit_norm}
        if self.made_from is not None:
            known["made_from"] = dict(self.made_from)
        if self.held:
            known["held"] = self.held
        if self.layout == "gemm":
            kept = ["lm_head", "router"]
            return known | {"quant_method": "awq", "version": "gemm", "modules_to_not_convert": kept}
        return known | {"quant_method": METHOD}


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Makes a loaded model's linears quantized ones before the weights arrive."""

    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        for layer in decoder_layers(model):
            for name, linear in layer.linears.items():
                full, shape = layer.path(name), (linear.out_features, linear.in_features)
                bits = config.bits_of(full)
                check_quantizable({full: shape}, bits, config.group_size)
                if config.held and config.read:
                    bits = config.read
                with torch.device("meta"):
                    packed = QuantizedLinear(
                        linear.in_features,
                        linear.out_features,
                        bits,
                        config.group_size,
                        config.layout,
                        linear.bias is not None,
                        linear.weight.dtype,
                        config.held,
                    )
                packed.switches = packed.switches and config.read is None
                layer.module.set_submodule(name, packed)
        if config.held and config.read not in (None, config.bits):
            left = [f"{PLANE}{width}" for width in config.held if width > (config.read or 0)]
            left += [f"{kind}{width}" for width in config.held[:-1] for kind in TERMS if width != config.read]
            names = rf"\.({'|'.join(left)})$"
            known = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*known, names}
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """Scales, the only float16 tensors of such a folder, keep their dtype whatever the model's is."""
        stored = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        return None if stored in ("F16", "torch.float16") else super().get_new_dtype(converter, param, dtype)

    def is_serializable(self) -> bool:
        """Until it runs (see `QuantizedLinear`), where all that the folder holds was loaded."""
        return self.quantization_config.read in (None, self.quantization_config.bits)

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    recipe: Recipe,
    final_norm: Tensor | None = None,
    made_from: Mapping[str, Any] | None = None,
    routers: Mapping[str, Tensor] | None = None,
) -> None:
    """Replaces the decoder layers' linears by packed quantized ones, in place; all else keeps its precision.

    Args:
        model: a LLaMA-family causal language model.
        recipe: what a search found for it.
        final_norm: a weight for its final norm, shape `(D,)`, that fits the recipe; see `refit_final_norm`.
        made_from: what the configuration is to say of its making; see `PackedConfig`.
        routers: parameters of its routers, by name, that fit the recipe; see `refit_routers`.

    Raises:
        ValueError: the model is quantized already, or the recipe is of another model.
    """
    check_recipe(model, recipe)
    config = PackedConfig.of(recipe, final_norm is not None, made_from)
    for layer in decoder_layers(model):
        packed = {}
        for name, linear in layer.linears.items():
            full = layer.path(name)
            try:
                weight = quantized_weight(layer, name, recipe)
                packed[name] = QuantizedLinear.of(
                    weight,
                    recipe.bits[full],
                    config.layout,
                    linear.bias,
                    config.held,
                    {w: own[full] for w, own in recipe.terms.items()},
                )
            except ValueError as error:
                raise ValueError(f"{full}: {error}") from error
        for name, module in packed.items():
            layer.module.set_submodule(name, module)
        scale_vectors(layer, recipe)
    if final_norm is not None:
        model.get_parameter("model.norm.weight").copy_(final_norm)
    for name, parameter in (routers or {}).items():
        model.get_parameter(name).copy_(parameter)
    model.config.quantization_config = config  # type: ignore[union-attr]
