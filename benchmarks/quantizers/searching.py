"""What an engine makes of a model."""

from collections.abc import Sequence

from torch import Tensor

from qtale_lightning.models import RoutedForCausalLM
from qtale_lightning.quantization.calibration import Batch
from qtale_lightning.quantization.final_norm import refit_final_norm
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.options import QuantizationOptions
from qtale_lightning.quantization.precision import allocate, neighbours, uniform
from qtale_lightning.quantization.recipe import Recipe


def search(
    model: RoutedForCausalLM, batches: Sequence[Batch], options: QuantizationOptions, bits: float
) -> tuple[Recipe, Tensor | None]:
    """What an engine makes of a width, or of an average: a recipe, and where it fits one, the final norm's weight."""
    shapes = linear_shapes(model)
    widths = [int(bits)] if bits == int(bits) else [*neighbours(bits)]
    wanted = [uniform(shapes, width, {}) for width in widths]
    recipes = options.declared(model, batches, wanted, options.group_size, **options.search_options)
    found = dict(zip(widths, recipes, strict=True))
    recipe = recipes[0] if len(recipes) == 1 else allocate(shapes, found, bits)
    return recipe, refit_final_norm(model, recipe, batches) if options.refits else None
