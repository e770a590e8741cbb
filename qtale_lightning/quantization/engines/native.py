"""AWQ's search from second moments, the suite's own; it measures damage, so that an average of bits can be spent."""

from collections.abc import Callable
from typing import Any

from qtale_lightning.quantization.engines.base import Engine


def _load() -> Callable[..., Any]:
    from qtale_lightning.quantization.awq import search

    return search


ENGINE = Engine(
    "native",
    "AWQ's search from second moments",
    _load,
    folder="awq",
    default=True,
    refits=True,
    averages=True,
)
