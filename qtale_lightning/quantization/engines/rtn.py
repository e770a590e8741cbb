"""Round to nearest: the baseline, which looks at no sequences and searches nothing."""

from collections.abc import Callable
from typing import Any

from qtale_lightning.quantization.engines.base import Engine


def _load() -> Callable[..., Any]:
    from qtale_lightning.architectures import architecture_of
    from qtale_lightning.quantization.recipe import round_to_nearest

    def search(
        model: Any, batches: Any, precisions: Any, group_size: int, symmetric: bool = False, **_: Any
    ) -> list[Any]:
        family = architecture_of(model.config).model_type
        return [round_to_nearest(dict(bits), group_size, symmetric, family) for bits in precisions]

    return search


ENGINE = Engine("rtn", "round to nearest", _load, calibrates=False)
