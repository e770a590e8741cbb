"""How many bits each linear gets: one width for all, exceptions by pattern, or an average-bits budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from qtale_lightning.architectures import Architecture, architecture_of
from qtale_lightning.quantization.mappings import split_name

if TYPE_CHECKING:  # what is planned and checked doesn't wait for PyTorch
    from qtale_lightning.quantization.recipe import Recipe

Bits = dict[str, int]
"""Bits of a weight by the linear's full name."""

# Widths of which an average-bits budget mixes the two nearest ones. A linear two steps down does more damage than
# others a step up make good: with 2 bits among the choices, an average of 3.5 on SmolLM2 was no better than 3.
CANDIDATES = (2, 3, 4, 8)


def uniform(shapes: Mapping[str, tuple[int, int]], bits: int, patterns: Mapping[str, int]) -> Bits:
    """One width for all linears but those whose full name matches a pattern (shell style; the last match wins).

    Args:
        shapes: of the linears, by full name.
        patterns: bits by pattern, e.g. `{"*.down_proj": 8, "model.layers.0.*": 8}`.

    Raises:
        ValueError: a pattern matches no linear.
    """
    chosen = dict.fromkeys(shapes, bits)
    for pattern, width in patterns.items():
        matching = [name for name in shapes if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(
                f"the pattern {pattern!r} matches none of the linears, such as {next(iter(shapes))}"
            )
        chosen |= dict.fromkeys(matching, width)
    return chosen


def check_shared(bits: Bits, architecture: Architecture) -> None:
    """Refuses linears that share an input and have different bits.

    Raises:
        ValueError: names two of them.
    """
    first: dict[str, str] = {}
    for name, width in bits.items():
        layer, mapping = split_name(name, architecture)
        other = first.setdefault(f"{layer}.{mapping.previous}", name)
        if bits[other] != width:
            raise ValueError(
                f"bits can't be mixed among linears that share an input: {other} has {bits[other]} and {name} has "
                f"{width}; give them the same bits, or choose another engine (--quantize.engine)"
            )


def average_bits(shapes: Mapping[str, tuple[int, int]], bits: Bits) -> float:
    """Mean bits of a code over all weights (scales and zero points not counted)."""
    total = sum(math.prod(shape) for shape in shapes.values())
    return sum(math.prod(shapes[name]) * width for name, width in bits.items()) / total


def allocate(
    shapes: Mapping[str, tuple[int, int]], candidates: Mapping[int, Recipe], budget: float
) -> Recipe:
    """Gives bits to where the measured error is largest, under a budget of average bits.

    The linears that share an input get the same width. All begin at one width; then, again and again, the step
    to a higher width that takes away most error a bit is made, while the budget holds (greedy on each mapping's
    lower convex hull of damage against bits, which is optimal up to the last step). A mapping's damage is relative to
    the residual stream (:class:`Recipe`), so that layers and kinds of linears can be compared.

    Args:
        shapes: of the linears, by full name.
        candidates: a search's recipe for each width to choose from, of one width each.
        budget: mean bits of a code over all weights.

    Raises:
        ValueError: the budget is outside the candidates' widths.
    """
    widths = sorted(candidates)
    if not widths[0] <= budget <= widths[-1]:
        raise ValueError(f"average bits {budget:g} are outside the widths to choose from, {widths}")
    family = architecture_of(candidates[widths[0]].family)
    units = [
        *dict.fromkeys(
            tuple(f"{layer}.{linear}" for linear in mapping.linears)
            for layer, mapping in (split_name(name, family) for name in shapes)
        )
    ]
    weights = {unit: sum(math.prod(shapes[name]) for name in unit) for unit in units}
    errors = {
        unit: {width: candidates[width].damage[_previous(unit, family)] for width in widths} for unit in units
    }
    # A step that doesn't fit may leave so much unspent that one width for all is better: begin at each that fits.
    climbs = [_climb(errors, weights, start, budget) for start in widths if start <= budget]
    chosen = min(climbs, key=lambda climb: sum(errors[unit][width] for unit, width in climb.items()))
    from qtale_lightning.quantization.recipe import Recipe

    return Recipe.compose({name: candidates[chosen[unit]] for unit in units for name in unit})


_Unit = tuple[str, ...]  # linears that share an input


def _previous(unit: _Unit, family: Architecture) -> str:
    """The operation before them."""
    layer, mapping = split_name(unit[0], family)
    return f"{layer}.{mapping.previous}"


def neighbours(budget: float) -> tuple[int, int]:
    """The two of `CANDIDATES` that a budget of average bits lies between."""
    return max(width for width in CANDIDATES if width <= budget), min(w for w in CANDIDATES if w >= budget)


def _climb(
    errors: Mapping[_Unit, Mapping[int, float]], weights: Mapping[_Unit, int], start: int, budget: float
) -> dict[_Unit, int]:
    """Widths by unit: from `start` for all, up by the steps that gain most a bit, while the budget holds."""
    steps = []
    for unit, error in errors.items():
        low = start
        while higher := [width for width in error if width > low]:  # along the lower convex hull
            gain, high = max(((error[low] - error[width]) / (width - low), width) for width in higher)
            if not gain >= 0:
                break
            steps.append((gain / weights[unit], unit, low, high))
            low = high
    chosen = dict.fromkeys(errors, start)
    left = (budget - start) * sum(weights.values())
    for _, unit, low, high in sorted(steps, key=lambda step: -step[0]):
        cost = (high - low) * weights[unit]
        if chosen[unit] == low and cost <= left + 1e-6:
            chosen[unit] = high
            left -= cost
    return chosen
