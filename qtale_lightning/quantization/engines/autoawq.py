"""AWQ's search by the AutoAWQ package's own functions: the reference for the suite's own."""

from collections.abc import Callable
from typing import Any

from qtale_lightning.quantization.engines.base import Engine


def _load() -> Callable[..., Any]:
    from qtale_lightning.quantization.autoawq import quantizer_class, search

    quantizer_class()  # says how to install it, before anything is computed
    return search


ENGINE = Engine("autoawq", "the AutoAWQ package's search", _load, mixes=False, packages=("autoawq",))
