"""Which evaluation row of a run answers a line of a table, and the commands that make the one that is missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qtale_lightning.digests import of_model
from qtale_lightning.evaluation.threshold import within_one_standard_error, within_tolerance
from qtale_lightning.manifest import listed
from qtale_lightning.quantization.engines import DEFAULT
from qtale_lightning.results.fingerprints import FORMAT, Fingerprint, differences, made
from qtale_lightning.results.predictions import compare_predictions, load_predictions
from qtale_lightning.results.schema import Evaluation
from qtale_lightning.results.selection import search_key
from qtale_lightning.results.series import own_questions, own_rows
from qtale_lightning.results.store import same_theta
from qtale_lightning.routing.perturbation import UNPERTURBED, Perturbation
from qtale_lightning.tables.runs import TableRun
from qtale_lightning.tables.theta import BudgetRule, GridRule, LineTheta

_SPLITS: tuple[Literal["calibration", "validation"], ...] = ("calibration", "validation")
Kind = Literal["fit", "quantize", "thresholds", "evaluate"]


@dataclass(frozen=True)
class Demand:
    """What a line asks of its run; a budget that is like another line's is a number here, or not known yet."""

    bits: float
    engine: str
    theta: LineTheta
    perturbation: Perturbation = UNPERTURBED
    bits_schedule: str = ""

    @property
    def row_engine(self) -> str:
        """As rows of results say it."""
        return "+".join(part for part in (self.engine, self.bits_schedule) if part)


@dataclass(frozen=True)
class Command:
    """A command of the package that a run needs.

    Attributes:
        evaluations: Passes over the validation questions that it makes, about.
    """

    kind: Kind
    run: TableRun
    engine: str
    arguments: tuple[str, ...]
    evaluations: int

    @property
    def says(self) -> str:
        """What it does, in a few words."""
        skipped = 1 if self.kind == "fit" else 2
        shown = [] if self.kind == "fit" else self.arguments[skipped:]
        return " ".join([self.kind, str(self.run.directory.root), *shown])


def find_row(run: TableRun, demand: Demand) -> Evaluation | None:
    """The validation row that answers a demand; None where an evaluation that decides it is missing.

    Rows of another model than the one that is there, or of other questions than the run's own, answer nothing.

    Raises:
        ValueError: The precision is there by other settings, so that its rows aren't those asked for.
        DamagedFileError: A file of the run isn't what it wrote.
    """
    results = run.results
    if not is_current(run, demand.bits, demand.engine):
        return None
    _check_settings(run, demand)
    model = _model(run, demand.bits, demand.engine)
    at = {
        split: [
            row
            for row in own_rows(results, split, demand.perturbation.record)
            if (row["bits"], row["engine"]) == (demand.bits, demand.row_engine) and _of(row, model)
        ]
        for split in _SPLITS
    }
    theta = demand.theta
    if isinstance(theta, BudgetRule):
        key, own = (
            (demand.bits, demand.engine, theta.rule, theta.budget),
            own_questions(results, "calibration"),
        )
        found = next(
            (
                search
                for search in results.get("searches", [])
                if search_key(search) == key
                and search.get("perturbation", {}) == demand.perturbation.record
                and _of(search, model, own)
            ),
            None,
        )
        return _at(at["validation"], found["theta"]) if found else None
    if isinstance(theta, GridRule):
        chosen = _choose(run, theta, at["calibration"])
        return _at(at["validation"], chosen["theta"]) if chosen else None
    return _at(at["validation"], theta)


def _of(row: Mapping[str, Any], model: str, questions: str | None = None) -> bool:
    """Whether a row or a search is of this model, and of these questions where they are known."""
    found: Fingerprint | None = row.get("fingerprint")
    if found is None or found.get("format") != FORMAT:
        return False
    return found["model"] == model and questions in (None, found["questions"])


def _model(run: TableRun, bits: float, engine: str) -> str:
    """The digest of a model that is there, from the run's list of its files: stages see to it that they are sound."""
    folder = run.directory.model(bits, engine)
    return of_model(folder, listed(run.directory.root, folder))


def is_current(run: TableRun, bits: float, engine: str) -> bool:
    """Whether a precision is there, and made from the run's model."""
    folder = run.directory.model(bits, engine)
    if not folder.is_dir():
        return False
    if bits == 16:
        return True
    made_from = made(run.directory.quantization_config(bits, engine)) or {}
    return made_from.get("model") == _model(run, 16, "none")


def _at(rows: Sequence[Evaluation], theta: float | list[float] | None) -> Evaluation | None:
    return next((row for row in rows if same_theta(row["theta"], theta)), None)


def _choose(run: TableRun, rule: GridRule, rows: Sequence[Evaluation]) -> Evaluation | None:
    """What the rule chooses from the grid, as `thresholds` does; None where a row or its predictions are missing."""
    grid = replace(run.sweep, rule=rule.rule, margin=rule.margin).grid()
    measured = [row for theta in grid if (row := _at(rows, theta))]
    if len(measured) < len(grid):
        return None
    if rule.rule == "one-standard-error":
        return within_one_standard_error(measured)
    outcomes = [load_predictions(run.directory.root, row) for row in measured]
    dense = outcomes[grid.index(0.0)]
    if dense is None or any(outcome is None for outcome in outcomes):
        return None
    differences = [compare_predictions(outcome, dense) for outcome in outcomes if outcome is not None]
    return within_tolerance(measured, differences, rule.margin)


def _check_settings(run: TableRun, demand: Demand) -> None:
    """Refuses a precision that was made by other settings than the table's: no cell may mix them."""
    made_from = made(run.directory.quantization_config(demand.bits, demand.engine))
    if made_from is None:
        return
    options = run.quantization.of_engine(demand.engine)
    settings = options.settings(demand.bits)
    other = [
        f"--quantize.{name} {made_from.get(name)} instead of {settings[name]}"
        for name in differences(made_from, settings)
    ]
    seen = made_from["calibration"]
    if (
        seen
        and options.sequences != seen["sequences"]
        and not (seen["all"] and options.sequences > seen["sequences"])
    ):
        other.append(f"--quantize.sequences {seen['sequences']} instead of {options.sequences}")
    if other:
        raise ValueError(
            f"{run.directory.model(demand.bits, demand.engine)} was made with {', '.join(other)}: give another folder "
            "(OUT=… of make, --out), or quantize it again as the table asks"
        )


def missing_commands(run: TableRun, demands: Sequence[Demand]) -> list[Command]:
    """What must run before every demand has its row, in order; nothing where all have it.

    A run that isn't finished is expected to bring what `fit` measures: all precisions of one engine over the grid.
    """
    commands: list[Command] = []
    fresh = not run.finished
    # What fit quantizes: the suite's own engine, where a line asks for it.
    engines = sorted({d.engine for d in demands if d.bits != 16}, key=lambda name: (name != DEFAULT, name))
    first = engines[0] if engines else run.quantization.engine
    by_engine = {engine: _bits(demands, engine) for engine in engines}
    if fresh:
        bits = by_engine.get(first, [])
        commands.append(_fit(run, bits, first))
    open_demands = [d for d in demands if not _answered(run, d, first, fresh)]
    for engine, bits in by_engine.items():
        unmade = [b for b in bits if not is_current(run, b, engine)]
        needed = [b for b in unmade if any((d.bits, d.engine) == (b, engine) for d in open_demands)]
        if needed and not (fresh and engine == first):
            commands.append(_stage("quantize", run, needed, engine, [], 0))
    return commands + _sweeps(run, open_demands, first) + _evaluations(run, open_demands, first)


def _answered(run: TableRun, demand: Demand, first: str, fresh: bool) -> bool:
    if not fresh:
        return find_row(run, demand) is not None
    by_fit = demand.engine in ("none", first) and not (demand.perturbation.record or demand.bits_schedule)
    if not by_fit or isinstance(demand.theta, BudgetRule):
        return False
    if isinstance(demand.theta, GridRule):
        return demand.theta.rule == "one-standard-error"
    return demand.theta is None or any(same_theta(demand.theta, theta) for theta in run.sweep.grid())


def _sweeps(run: TableRun, demands: Sequence[Demand], first: str) -> list[Command]:
    """One sweep for each rule, or each set of budgets, of an engine and a perturbation."""
    wanted: dict[tuple[str, str, float | None, Perturbation], list[Demand]] = {}
    budgets: dict[tuple[str, str, Perturbation, float], set[float]] = {}
    for demand in demands:
        engine = first if demand.engine == "none" else demand.engine
        theta, perturbed = demand.theta, demand.perturbation
        if demand.bits_schedule:  # an evaluation
            continue
        if isinstance(theta, GridRule):
            wanted.setdefault((engine, theta.rule, theta.margin, perturbed), []).append(demand)
        elif theta is None:
            wanted.setdefault((engine, "one-standard-error", None, perturbed), []).append(demand)
        elif isinstance(theta, BudgetRule):
            # A budget that isn't known yet is counted, but never started.
            budgets.setdefault((engine, theta.rule, perturbed, demand.bits), set()).add(theta.budget or 0.0)
    commands = []
    for (engine, rule, margin, perturbed), group in wanted.items():
        options = ["--sweep.rule", rule, "--sweep.thresholds", _list(run.sweep.thresholds)]
        options += ["--sweep.margin", str(margin)] if margin is not None else []
        options += perturbed.arguments
        bits = _bits(group, engine)
        count = (1 + len(bits)) * len(run.sweep.thresholds)
        commands.append(_stage("thresholds", run, bits, engine, options, count))
    alike: dict[tuple[str, str, Perturbation, tuple[float, ...]], list[float]] = {}
    for (engine, rule, perturbed, width), values in budgets.items():
        alike.setdefault((engine, rule, perturbed, tuple(sorted(values))), []).append(width)
    for (engine, rule, perturbed, targets), widths in alike.items():
        bits = [width for width in widths if width != 16]
        options = ["--sweep.rule", rule, "--sweep.budgets", _list(targets), *perturbed.arguments]
        commands.append(_stage("thresholds", run, bits, engine, options, 2 * len(widths) * len(targets)))
    return commands


def _evaluations(run: TableRun, demands: Sequence[Demand], first: str) -> list[Command]:
    """One evaluation for each fixed θ, and for each schedule of bits."""
    commands = []
    for demand in demands:
        if isinstance(demand.theta, float) or demand.bits_schedule:
            engine = first if demand.engine == "none" else demand.engine
            options = ["--bits", f"{demand.bits:g}"]
            if demand.theta is not None:
                options += ["--theta", f"{demand.theta:g}"]
            if demand.bits_schedule:
                options += ["--bits_schedule", demand.bits_schedule]
            options += demand.perturbation.arguments
            commands.append(_stage("evaluate", run, None, engine, options, 1))
    return commands


def _bits(demands: Sequence[Demand], engine: str) -> list[float]:
    return sorted({d.bits for d in demands if d.engine == engine and d.bits != 16}, reverse=True)


def _fit(run: TableRun, bits: Sequence[float], engine: str) -> Command:
    quantize = ["--quantize.bits", _list(bits), "--quantize.engine", engine]
    rule = ["--sweep.rule", "one-standard-error"]
    count = (1 + len(bits)) * len(run.sweep.thresholds)
    return Command("fit", run, engine, ("fit", *run.arguments, *quantize, *rule), count)


def _stage(
    kind: Kind,
    run: TableRun,
    bits: Sequence[float] | None,
    engine: str,
    options: Sequence[str],
    evaluations: int,
) -> Command:
    """A stage command; what quantization depends on is as in the table's configuration, not in the run's."""
    arguments = [kind, str(run.directory.root), "--quantize.engine", engine]
    if bits is not None:
        arguments += ["--quantize.bits", _list(bits)]
    if kind == "quantize":
        arguments += run.quantization.of_engine(engine).arguments()
    return Command(kind, run, engine, (*arguments, *run.moved(), *options), evaluations)


def _list(values: Sequence[float]) -> str:
    return f"[{','.join(f'{value:g}' for value in values)}]"
