"""SignRound (Cheng et al. 2024; AutoRound): rounding and clipping learned by sign gradient descent, from AWQ's scales.

Its options: `steps` of each window of decoder layers, on `batch` calibration sequences each; `lr`, the first step's
rate, as a multiple of 1/steps, from which it falls linearly; `window`, one or two layers that are learned together; and
the `seed` of which sequences come together, and when.
"""

from collections.abc import Callable, Mapping
from typing import Any

from qtale_lightning.quantization.engines.base import Engine


def _load() -> Callable[..., Any]:
    from qtale_lightning.quantization.signround import search

    return search


def _check(options: Mapping[str, Any], layers: int) -> None:
    for name in ("steps", "batch"):
        if options[name] < 1:
            raise ValueError(f"{name} must be at least 1, not {options[name]}")
    if options["window"] not in (1, 2):
        raise ValueError(f"window is 1 or 2 layers, not {options['window']}")
    if options["window"] > layers:
        raise ValueError(f"window {options['window']} is more than the model's {layers} layer(s)")


ENGINE = Engine(
    "signround",
    "SignRound's learned rounding, from AWQ's scales",
    _load,
    keeps_codes=True,
    refits=True,
    sequential=True,
    options={"steps": 200, "batch": 8, "lr": 1.0, "window": 1, "seed": 0},
    explained="steps of each window, on batch sequences each, at lr times 1/steps falling to 0, window, the layers "
    "learned together (1 or 2), and seed",
    alone=True,
    check=_check,
)
