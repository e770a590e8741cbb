"""How diverse the paths of a table's lines are, and what quantization costs them: whether one goes with the other."""

import statistics
from collections.abc import Sequence
from dataclasses import replace

from qtale_lightning.evaluation.statistics import Estimate
from qtale_lightning.paths import path_distance
from qtale_lightning.results.schema import Results, units_executed
from qtale_lightning.routing import method_of
from qtale_lightning.tables.bold import Side, difference
from qtale_lightning.tables.declaration import Line
from qtale_lightning.tables.plots import Related
from qtale_lightning.tables.table import Table

MEASURES = ("path distance at inference", "path distance in training", "nll at 16 bits, nats")
"""What is held against the nll that quantization adds; the last one is what it may depend on instead."""


def trained_distance(results: Results) -> float | None:
    """Of the paths that tokens took at the end of training, noise included; None: what decided isn't known."""
    if not method_of(results["run"]["method"]).decides:
        return 0.0  # all tokens have one path
    return path_distance(results["routing"]["execution_ratio_per_layer"]) if "routing" in results else None


def unquantized(table: Table, line: Line) -> Line | None:
    """The line that differs from another one in its precision alone, which is 16 bits; None for such a line itself."""
    if line.bits == 16:
        return None
    wanted = replace(line, bits=16, engine="none")
    return next((one for one in table.lines if one == wanted), None)


def added_nll(table: Table, line: Line, data: str) -> Estimate | None:
    """What the nll of a line has above that of the same at 16 bits, paired by question, in nats a token.

    θ of each is found by itself, so that both execute as much as is asked for. None where either isn't measured.
    """
    base = unquantized(table, line)
    if base is None:
        return None
    ours, theirs = (_sides(table, one, data) for one in (line, base))
    complete = len(ours) == len(theirs) == len(table.request.seeds)
    return difference(ours, theirs, None, "nll") if complete else None


def _sides(table: Table, line: Line, data: str) -> list[Side]:
    found = [table.answer(line, data, seed) for seed in table.request.seeds]
    return [side for answer in found if (side := answer.side)]


def related(table: Table, data: str, bits: float) -> list[Related]:
    """Lines of a precision whose added nll is measured, in order."""
    points = []
    for line in table.lines:
        if line.bits != bits or data not in table.data_of(line):
            continue
        added, base = added_nll(table, line, data), unquantized(table, line)
        if added is None or base is None:
            continue
        answers = [table.answer(base, data, seed) for seed in table.request.seeds]
        rows = [(answer, answer.row) for answer in answers if answer.row is not None]
        values = (
            _mean([path_distance(units_executed(row)) for _, row in rows]),
            # Perturbed at inference, a run is the same run: it counts once.
            None if line.perturbation.record else _mean([trained_distance(a.results) for a, _ in rows]),
            _mean([row["average_nll"] for _, row in rows]),
        )
        measures = dict(zip(MEASURES, values, strict=True))
        points.append(Related(line.group or line.name, line.setting, measures, (added.value, added.stderr)))
    return points


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
