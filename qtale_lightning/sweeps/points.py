"""The points of a sweep without W&B's server: a grid, or draws that a seed fixes."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from qtale_lightning.sweeps.definition import SweepDefinition

Point = dict[str, Any]
DIGITS = 4
"""Significant digits of drawn numbers: they become names of folders."""


def points(sweep: SweepDefinition, seed: int = 0, count: int | None = None) -> list[Point]:
    """Values of all parameters, run after run.

    Draw i of a random sweep depends on the seed and i alone, so a longer sweep begins as a shorter one.

    Args:
        count: The most points; by default the file's run_cap.

    Raises:
        ValueError: The method or a distribution needs W&B's server, a parameter is declared wrongly, or a random sweep
            has no end; the message names sweep and key.
    """
    cap = count if count is not None else sweep.run_cap
    if sweep.method == "bayes":
        raise ValueError(
            f"sweep {sweep.name}: method bayes needs W&B's server; locally there are grid and random"
        )
    if sweep.method == "grid":
        grid = [_values(sweep, name) for name in sweep.parameters]
        return [dict(zip(sweep.parameters, values, strict=True)) for values in itertools.product(*grid)][:cap]
    if cap is None:
        raise ValueError(
            f"sweep {sweep.name}: run_cap is missing: a random sweep has no end (or give COUNT=…)"
        )
    draws = {name: _distribution(sweep, name) for name in sweep.parameters}
    generators = (np.random.default_rng((seed, index)) for index in range(cap))
    return [{name: draw(generator) for name, draw in draws.items()} for generator in generators]


def _values(sweep: SweepDefinition, name: str) -> list[Any]:
    """Of a parameter of a grid."""
    declared = sweep.parameters[name]
    if declared.keys() == {"value"}:
        return [declared["value"]]
    if (
        declared.keys() <= {"values", "distribution"}
        and isinstance(declared.get("values"), list)
        and declared["values"]
    ):
        return list(declared["values"])
    raise _refused(sweep, name, "a grid takes `value` or a list of `values`")


def _distribution(sweep: SweepDefinition, name: str) -> Callable[[np.random.Generator], Any]:
    """How a parameter is drawn; W&B's rule where a file leaves the distribution out."""
    declared = sweep.parameters[name]
    if "value" in declared or "values" in declared:
        values = _values(sweep, name)
        return lambda generator: values[int(generator.integers(len(values)))]
    low: Any = declared.get("min")
    high: Any = declared.get("max")
    if declared.keys() - {"min", "max", "distribution"} or not _ordered(low, high):
        raise _refused(sweep, name, "give `values`, or a `min` below a `max`")
    whole = isinstance(low, int) and isinstance(high, int)
    kind = declared.get("distribution", "int_uniform" if whole else "uniform")
    if kind == "int_uniform" and whole:
        return lambda generator: int(generator.integers(low, high + 1))
    if kind == "uniform":
        return lambda generator: _rounded(generator.uniform(low, high))
    if kind == "log_uniform_values" and low > 0:
        return lambda generator: _rounded(math.exp(generator.uniform(math.log(low), math.log(high))))
    raise _refused(
        sweep, name, f"distribution {kind} isn't drawn locally (uniform, int_uniform, log_uniform_values)"
    )


def _ordered(low: Any, high: Any) -> bool:
    return all(isinstance(end, int | float) for end in (low, high)) and low < high


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _refused(sweep: SweepDefinition, name: str, reason: str) -> ValueError:
    return ValueError(f"sweep {sweep.name}: parameters.{name}: {reason}")
