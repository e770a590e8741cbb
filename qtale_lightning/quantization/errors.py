"""What rounding a linear does to its outputs, from the second moments of its inputs."""

from torch import Tensor, ones

from qtale_lightning.quantization.calibration import Moments
from qtale_lightning.quantization.mappings import DecoderLayer
from qtale_lightning.quantization.recipe import Recipe, clip_weight
from qtale_lightning.quantization.rtn import fake_quantize

ROWS = 256  # outputs taken at a time: little memory, and a working set that a core's cache holds


def output_error(delta: Tensor, gram: Tensor) -> Tensor:
    """‖X·ΔWᵀ‖² = tr(ΔW·G·ΔWᵀ) of a weight change, shape `(out, in)`, and G = XᵀX, shape `(in, in)`."""
    return (delta @ gram).mul_(delta).sum()


def output_errors(layer: DecoderLayer, moments: dict[str, Moments], recipe: Recipe) -> dict[str, float]:
    """The errors of a layer's linears under a recipe, by full name; see :class:`Recipe`."""
    errors = {}
    for mapping in layer.architecture.mappings:
        inputs = moments[mapping.linears[0]]
        scale = recipe.scales.get(layer.path(mapping.previous), ones(())).to(inputs.gram)
        for name in mapping.linears:
            full, weight = layer.path(name), layer.linears[name].weight.detach()
            scheme, clips, kept = recipe.scheme(full), recipe.clips.get(full), recipe.codes.get(full)
            total = 0.0
            for first in range(0, len(weight), ROWS):
                rows = weight[first : first + ROWS].float()
                if kept is None:
                    clipped = clip_weight(
                        rows * scale, None if clips is None else clips[first : first + ROWS]
                    )
                    values = fake_quantize(clipped, scheme)
                else:
                    values = kept.rows(first, first + ROWS).quantized().dequantize().to(rows.device)
                delta = values.div_(scale).sub_(rows)
                total += output_error(delta, inputs.gram).item()
            errors[full] = total / inputs.tokens / len(weight)
    return errors
