"""A declared table for one model, data, seeds and folder: its runs, what they are asked, and the rows that answer."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qtale_lightning.experiments import names
from qtale_lightning.results.schema import Evaluation, Results
from qtale_lightning.tables.bold import Side
from qtale_lightning.tables.declaration import Declaration, Line
from qtale_lightning.tables.request import Request
from qtale_lightning.tables.rows import Command, Demand, find_row, missing_commands
from qtale_lightning.tables.runs import TableRun, known_runs, resolve
from qtale_lightning.tables.theta import BudgetRule


@dataclass(frozen=True)
class Answer:
    """A line's row of one run; None where it is missing."""

    run: TableRun
    results: Results
    row: Evaluation | None

    @property
    def side(self) -> Side | None:
        """What of it is compared with other lines; None where the row is missing."""
        return None if self.row is None else Side(self.run.directory.root, self.row)


@dataclass(frozen=True)
class Table:
    """A declaration with its request."""

    name: str
    declaration: Declaration
    request: Request

    @cached_property
    def lines(self) -> list[Line]:
        """The declaration's."""
        return self.declaration.lines

    @cached_property
    def base(self) -> tuple[Path, ...]:
        """The configuration that all runs build on.

        Raises:
            FileNotFoundError: There is no such model.
            ValueError: as `Declaration.base_of`.
        """
        model = self.request.model
        if model not in names("models"):
            raise FileNotFoundError(f"--model {model}: choose one of {', '.join(names('models'))}")
        return self.declaration.base_of(model)

    @cached_property
    def _resolved(self) -> dict[tuple[Any, ...], TableRun]:
        known = known_runs(self.request.out)
        found: dict[tuple[Any, ...], TableRun] = {}
        in_order = sorted(self.lines, key=lambda line: self.declaration.levels[line.kind])
        for seed in self.request.seeds:
            for line in in_order:
                for data in self.data_of(line):
                    key = self._key(line, data, seed)
                    if key not in found:  # parsing a configuration takes a third of a second
                        source = self.declaration.source(line)
                        begun = None if source is None else found[self._key(source, data, seed)]
                        found[key] = resolve(self.request, self.base, line, data, seed, known, begun)
                    if line.bits_schedule:
                        found[key].asking.check_written(line.bits_schedule)
        return found

    def data_of(self, line: Line) -> tuple[str, ...]:
        """A line's data, each of which needs runs of its own."""
        return line.data or (self.request.data,)

    def run_of(self, line: Line, data: str, seed: int) -> TableRun:
        """The run that a line's row comes from."""
        return self._resolved[self._key(line, data, seed)]

    @staticmethod
    def _key(line: Line, data: str, seed: int) -> tuple[Any, ...]:
        return line.kind, data, seed

    @cached_property
    def runs(self) -> list[TableRun]:
        """Every run once."""
        return [run for stage in self.stages for run in stage]

    @cached_property
    def stages(self) -> list[list[TableRun]]:
        """Every run once, by seed; before it, in an earlier stage, those that it takes a budget from or begins with."""
        of_runs: dict[str, tuple[int, TableRun]] = {}
        for (kind, *_), run in self._resolved.items():
            level, _ = of_runs.get(run.identity, (0, run))
            of_runs[run.identity] = max(level, self.declaration.levels[kind]), run
        ordered = sorted({level for level, _ in of_runs.values()})
        return [[run for level, run in of_runs.values() if level == stage] for stage in ordered]

    def demand(self, line: Line, data: str, seed: int) -> Demand | None:
        """What a line asks of its run; None where it goes by a line that has no row yet."""
        demand = Demand(line.bits, line.engine, line.theta, line.perturbation, line.bits_schedule)
        other = self.declaration.like(line)
        if other is None:
            return demand
        row = self.answer(other, data, seed).row
        if row is None:
            return None
        assert isinstance(line.theta, BudgetRule)
        # Three digits: finer than a search comes to its budget.
        budget = min(1.0, round(row["execution_ratio"], 3))
        return replace(demand, theta=BudgetRule(rule=line.theta.rule, budget=budget))

    def demands(self, run: TableRun, unknown: bool = False) -> list[Demand]:
        """What all lines ask of a run; with budgets that aren't known yet, if they are to be counted."""
        found: dict[Demand, None] = {}
        for line in self.lines:
            for data in self.data_of(line):
                if self.run_of(line, data, run.seed).identity != run.identity:
                    continue
                demand = self.demand(line, data, run.seed)
                if demand is None and unknown:
                    demand = Demand(line.bits, line.engine, line.theta, line.perturbation, line.bits_schedule)
                if demand is not None:
                    found[demand] = None
        return list(found)

    def answer(self, line: Line, data: str, seed: int) -> Answer:
        """A line's row, where it is there."""
        run = self.run_of(line, data, seed)
        demand = self.demand(line, data, seed)
        row = find_row(run, demand) if demand and run.finished else None
        return Answer(run, run.results, row)

    def missing(self) -> dict[Path, list[Command]]:
        """The commands that every run still needs, by its folder."""
        found = {
            run.directory.root: missing_commands(run, self.demands(run, unknown=True)) for run in self.runs
        }
        return {root: commands for root, commands in found.items() if commands}


def commit_of(results: Results) -> str:
    """The commit that made a run."""
    git = results["run"]["git"]
    return "unknown" if git is None else git["commit"] + (" with changes" if git["dirty"] else "")
