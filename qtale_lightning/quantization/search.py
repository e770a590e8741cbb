"""The search that the engines share: one pass over the calibration tokens, layer by layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from qtale_lightning.architectures import Architecture, architecture_of
from qtale_lightning.quantization.calibration import (
    Batch,
    Moments,
    check_model,
    collect_moments,
    every_nth,
    layer_by_layer,
)
from qtale_lightning.quantization.mappings import DecoderLayer
from qtale_lightning.quantization.options import MIN_TOKENS
from qtale_lightning.quantization.precision import Bits
from qtale_lightning.quantization.recipe import Recipe, quantized_layer
from qtale_lightning.quantization.replay import Call, recorded_calls


@dataclass(frozen=True)
class Observed:
    """What calibration saw of one layer.

    Attributes:
        moments: sums over the inputs of its linears, by the first linear that reads each input.
        calls: of the modules that the engine records, by their names in the layer.
    """

    moments: dict[str, Moments]
    calls: Mapping[str, list[Call]]


@dataclass(frozen=True)
class Search:
    """An engine's search for scales and clips, or codes, by calibration.

    Attributes:
        search_layer: searches one decoder layer at a recipe's bits, and writes what it finds into the recipe; the
            engine's own options come by name.
        recorded: modules of a family's layer whose calls it needs.
        recorded_tokens: padded tokens that it needs the calls of; None takes all batches, else some that are spread
            evenly over the calibration set.
    """

    search_layer: Callable[..., None]
    recorded: Callable[[Architecture], Sequence[str]] = lambda architecture: ()
    recorded_tokens: int | None = None

    def __call__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        precisions: Sequence[Bits],
        group_size: int,
        symmetric: bool = False,
        *,
        sequential: bool = False,
        min_tokens: int = MIN_TOKENS,
        progress: Callable[[str, int], None] | None = None,
        **options: Any,
    ) -> list[Recipe]:
        """Searches every precision: in one pass over the calibration tokens, or in one each where it is sequential.

        Args:
            model: a causal language model of a declared family in evaluation mode; it isn't changed.
            batches: calibration tokens, as arguments of `model.model`.
            precisions: each gives bits by linear.
            sequential: layers see what the quantized layers before them give, not what those of the model do.
            min_tokens: fewest tokens that a layer's search may rest on.
            progress: called after each layer of a pass with its name and its number of tokens.
            options: the engine's own.

        Returns:
            One recipe for each of `precisions`.

        Raises:
            ImportError: the engine's package isn't installed.
            ValueError: the group size doesn't fit, weights or activations have NaN or infinity, a layer saw too few
                tokens, or a search found no finite error.
        """
        for bits in precisions:
            check_model(model, bits, group_size)
        family = architecture_of(model.config)
        recipes = [Recipe("", dict(bits), group_size, symmetric, family.model_type) for bits in precisions]
        every = 1 if self.recorded_tokens is None else every_nth(batches, self.recorded_tokens)
        for together in [[recipe] for recipe in recipes] if sequential else [recipes]:
            for layer, run in layer_by_layer(model, batches):
                with recorded_calls(layer, self.recorded(family), every) as calls:
                    seen = Observed(
                        collect_moments(layer, partial(run, advance=not sequential), min_tokens), calls
                    )
                tokens = seen.moments[family.linears[0]].tokens
                for recipe in together:
                    self.search_layer(layer, seen, recipe, **options)
                    _check_errors(layer, recipe)
                    recipe.tokens[layer.name] = tokens
                if progress:
                    progress(layer.name, tokens)
                del seen, calls  # before the next layer's are summed
                if sequential:
                    run(quantized_layer(layer, together[0]))
        return recipes


def _check_errors(layer: DecoderLayer, recipe: Recipe) -> None:
    """Refuse what a search found for a layer where no finite number says what they leave (ValueError)."""
    for kind, errors in (("output error", recipe.errors), ("damage", recipe.damage)):
        for name, error in errors.items():
            if name.startswith(f"{layer.name}.") and not math.isfinite(error):
                raise ValueError(
                    f"{name} at {recipe.bits.get(name, min(recipe.bits.values()))} bits has no finite {kind}: its "
                    "weights or activations are too large"
                )
