"""One folder, every precision: codes whose highest 3 and 2 bits are models, too (MatQuant, Nair et al. 2025; MatGPTQ,
Kleinegger et al. 2026; OTARo, 2025), learned as by `signround`, whose options it has.

The steps take the widths in turn, the widest first: there are as many of each. A width's layers see what the layers
before them give at that width. `lowest` is the narrowest: with 4 the codes are `signround`'s at 4 bits. Every precision
lies in the same folder, `model-nested`, whichever are asked for.
"""

from collections.abc import Callable
from typing import Any

from qtale_lightning.quantization.engines.base import Engine
from qtale_lightning.quantization.engines.signround import ENGINE as LEARNED

WIDEST = 4


def _load() -> Callable[..., Any]:
    from qtale_lightning.quantization.signround import search_nested

    return search_nested


def _check(options: Any, layers: int) -> None:
    LEARNED.check({name: options[name] for name in LEARNED.options}, layers)
    if not 2 <= options["lowest"] <= WIDEST:
        raise ValueError(f"lowest is from 2 to {WIDEST} bits, not {options['lowest']}")


ENGINE = Engine(
    "nested",
    "signround's codes of 4 bits, whose highest 3 and 2 bits are models, too, in one folder",
    _load,
    keeps_codes=True,
    widths=(2, 3, WIDEST),
    holds=WIDEST,
    sequential=True,
    options={**LEARNED.options, "lowest": 2},
    explained="steps (of each width), batch, lr, window and seed as signround's, and lowest, the narrowest width",
    alone=True,
    check=_check,
)
