"""A method's finished runs, one a seed, and what a figure takes from their rows: precisions, curves and points."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from qtale_lightning.results.schema import Evaluation, Results
from qtale_lightning.results.series import own_rows
from qtale_lightning.results.store import load_results, same_theta
from qtale_lightning.routing import method_of
from qtale_lightning.tables.declaration import Line, Option, setting_of
from qtale_lightning.tables.plots import Point
from qtale_lightning.tables.runs import TableRun
from qtale_lightning.tables.table import Table

TARGET = "model.target_ratio"


@dataclass(frozen=True)
class Variant:
    """The finished runs, one a seed, of a method with its options."""

    line: Line
    data: str
    runs: list[TableRun]
    results: list[Results]

    @property
    def label(self) -> str:
        """Such as "QTALE, λ₂ = 2"."""
        return self._titled(self.line.options)

    @property
    def curve(self) -> str:
        """What it is a part of where ratios are compared: without θ, each run has one point of its method's curve."""
        others = [(key, value) for key, value in self.line.options if key != TARGET]
        return self.label if method_of(self.line.method).theta else self._titled(others)

    def _titled(self, options: Sequence[tuple[str, Option]]) -> str:
        after = f"after {self.line.after}" if self.line.after else ""
        return ", ".join(filter(None, [method_of(self.line.method).title, setting_of(options), after]))

    def rows(self, bits: float, engine: str) -> list[list[Evaluation]]:
        """Validation rows at every θ (one for all layers) that all seeds have; by execution ratio."""
        by_seed = [
            [
                row
                for row in own_rows(results)
                if (row["bits"], row["engine"]) == (bits, engine) and not isinstance(row["theta"], list)
            ]
            for results in self.results
        ]
        groups = []
        for row in by_seed[0]:
            alike = [[o for o in others if same_theta(o["theta"], row["theta"])] for others in by_seed]
            if all(alike):
                groups.append([found[0] for found in alike])
        return sorted(groups, key=lambda group: statistics.fmean(row["execution_ratio"] for row in group))


def find_variants(table: Table, data: str) -> list[Variant]:
    """Those of a table's lines that have finished runs on a data set.

    Raises:
        FileNotFoundError, ValueError: as `load_results`.
    """
    found: dict[tuple[object, ...], Variant] = {}
    used: set[str] = set()
    for line in table.lines:
        if line.kind in found or data not in table.data_of(line):
            continue
        runs = [table.run_of(line, data, seed) for seed in table.request.seeds]
        runs = [run for run in runs if run.finished]
        if runs and runs[0].identity not in used:
            used.add(runs[0].identity)
            results = [load_results(run.directory.root) for run in runs]
            found[line.kind] = Variant(line, data, runs, results)
    return list(found.values())


def precisions(table: Table) -> dict[str, tuple[float, str]]:
    """Bits and engine of the table's lines, by name."""
    found = sorted({(line.bits, line.engine) for line in table.lines}, key=lambda one: (-one[0], one[1]))
    several = len({engine for _, engine in found} - {"none"}) > 1
    return {
        f"{bits:g} bits{f' {engine}' if several and engine != 'none' else ''}": (bits, engine)
        for bits, engine in found
    }


def _mean(values: Sequence[float], errors: Sequence[float], factor: float = 1) -> tuple[float, float]:
    """Mean and standard error over seeds, over questions where there is one."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else errors[0]
    return factor * statistics.fmean(values), factor * error


def point_of(group: Sequence[Evaluation]) -> Point:
    """A point of a curve: rows of all seeds at one precision and θ."""
    averages = [row["average"] for row in group if row["average"] is not None]
    return Point(
        statistics.fmean(row["execution_ratio"] for row in group),
        _mean(averages, [group[0]["average_stderr"] or 0.0], 100) if len(averages) == len(group) else None,
        _mean([row["average_nll"] for row in group], [group[0]["average_nll_stderr"]]),
    )
