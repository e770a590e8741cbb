"""What searches a quantization, by the engine's name."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from qtale_lightning.architectures import architecture_of
from qtale_lightning.quantization import autoawq, awq
from qtale_lightning.quantization.calibration import Batch
from qtale_lightning.quantization.options import Engine
from qtale_lightning.quantization.precision import Bits
from qtale_lightning.quantization.recipe import Recipe, round_to_nearest


def _round_to_nearest(
    model: nn.Module,
    batches: Sequence[Batch],
    precisions: Sequence[Bits],
    group_size: int,
    symmetric: bool = False,
    **_: Any,
) -> list[Recipe]:
    """The baseline: no scales, no clips, nothing to calibrate."""
    family = architecture_of(model.config).model_type
    return [round_to_nearest(dict(bits), group_size, symmetric, family) for bits in precisions]


ENGINES: dict[Engine, Callable[..., list[Recipe]]] = {
    "native": awq.search,
    "autoawq": autoawq.search,
    "rtn": _round_to_nearest,
}
