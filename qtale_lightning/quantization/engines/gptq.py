"""GPTQ (Frantar et al. 2023): each column's rounding error is made good in the columns that follow it.

Its options: `percdamp`, what is added to the Hessian's diagonal, as a share of its mean; and `act_order`, columns in
order of falling second moments (`desc_act`), with groups that are set beforehand and so stay contiguous.
"""

from collections.abc import Callable
from typing import Any

from qtale_lightning.quantization.engines.base import Engine


def _load() -> Callable[..., Any]:
    from qtale_lightning.quantization.gptq import search

    return search


ENGINE = Engine(
    "gptq",
    "GPTQ's recursion over columns",
    _load,
    keeps_codes=True,
    options={"percdamp": 0.01, "act_order": False},
    explained="percdamp, what is added to the Hessian's diagonal as a share of its mean, and act_order, columns in "
    "order of falling second moments",
)
