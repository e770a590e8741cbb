"""The sweep: every precision at every θ of a grid, or at the θ that meets a budget, and the θ that is selected."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, Literal, cast

from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.evaluation.accuracy import accuracy_by_task, mean_over_tasks
from qtale_lightning.evaluation.budget import (
    Calibration,
    Theta,
    UnmetBudgetError,
    find_layer_thresholds,
    find_threshold,
)
from qtale_lightning.evaluation.options import SweepOptions
from qtale_lightning.evaluation.scoring import Scores
from qtale_lightning.evaluation.threshold import (
    NO_THETA,
    ONE_STANDARD_ERROR,
    budget_in_words,
    tolerance_in_words,
    within_one_standard_error,
    within_tolerance,
)
from qtale_lightning.report.notes import theta_text
from qtale_lightning.results.fingerprints import Fingerprint
from qtale_lightning.results.predictions import compare_predictions, load_predictions
from qtale_lightning.results.schema import Evaluation
from qtale_lightning.results.selection import Search, Selected, search_key
from qtale_lightning.results.series import own_questions
from qtale_lightning.results.store import load_or_new, update_results
from qtale_lightning.routing.perturbation import UNPERTURBED, Perturbation, perturb, perturbed
from qtale_lightning.run import RunDirectory
from qtale_lightning.stages.evaluate import Subject
from qtale_lightning.stages.export import load_exported
from qtale_lightning.stages.progress import console, progress

_SPLITS: tuple[Literal["calibration", "validation"], ...] = ("calibration", "validation")


def sweep(
    run: RunDirectory,
    data: CommonsenseDataModule,
    bits: Sequence[float],
    engine: str,
    options: SweepOptions,
    perturbation: Perturbation = UNPERTURBED,
) -> None:
    """At every precision: the θ that the rule selects on calibration questions, and what validation questions say.

    Calibration questions come from the training split and were not trained on. A rule on a grid has every θ of it
    measured on both splits, a budget only the θ that meets it. A model without θ has one row a precision. What an
    earlier sweep has measured or found isn't repeated. A sweep of other questions than the run's own, or of decisions
    that are perturbed, adds its rows, and leaves what is selected as it is.

    Raises:
        UnmetBudgetError: Budgets can't be met, at the precisions that the message names; all else is there.
        ValueError: A budget is below the share of layers without a router, or the model can't be perturbed so.
    """
    selected: list[Selected] = []
    unmet: list[str] = []
    for b in (16, *sorted(bits, reverse=True)):
        subject = Subject(run, data, load_exported(run, b, engine), b, "none" if b == 16 else engine)
        perturb(subject.model, perturbation)
        if not subject.model.config.has_theta:
            (row,) = subject.evaluate([None], "validation")
            selected.append(_selected(row, NO_THETA))
        elif options.searches:
            config = subject.model.config
            options.check_budgets(config.start_layer / config.num_hidden_layers)
            for budget in options.budgets:
                try:
                    selected.append(_meet(subject, budget, options.rule == "layer-budget"))
                except UnmetBudgetError as error:
                    unmet.append(f"{subject}: {error}")
                    console.print(f"{subject.bits:>3g} bits: budget {budget:g} isn't met")
        else:
            selected.append(_select(subject, options))
        del subject  # before the next model is loaded
    if perturbation.record:
        console.print("decisions were perturbed: what is selected stays as it was")
    else:
        _keep_selected(run, data, selected)
    if unmet:
        raise UnmetBudgetError("; ".join(unmet) + ". All else that was asked for is done")


def _keep_selected(run: RunDirectory, data: CommonsenseDataModule, selected: Sequence[Selected]) -> None:
    """Write what was selected, in place of what was selected before at the same precisions."""
    results = load_or_new(run.root)
    for split in _SPLITS:
        if own_questions(results, split) not in (None, data.digest(split)):
            console.print(f"other {split} questions than this run's own: what is selected stays as it was")
            return
    again = {(one["bits"], one["engine"]) for one in selected}
    others = [one for one in results["selected"] if (one["bits"], one.get("engine")) not in again]
    update_results(run.root, "selected", sorted([*selected, *others], key=lambda one: -one["bits"]))


def _select(subject: Subject, options: SweepOptions) -> Selected:
    """The choice from the grid."""
    grid = options.grid()
    difference: dict[str, Any] = {}
    if options.rule == "tolerance":
        rows = subject.evaluate(grid, "calibration", pairs=True)
        outcomes = [load_predictions(subject.run.root, row) or [] for row in rows]
        differences = [compare_predictions(outcome, outcomes[grid.index(0.0)]) for outcome in outcomes]
        chosen, words = (
            within_tolerance(rows, differences, options.margin),
            tolerance_in_words(options.margin),
        )
        difference = {"difference": asdict(differences[rows.index(chosen)])}
    else:
        rows = subject.evaluate(grid, "calibration")
        chosen, words = within_one_standard_error(rows), ONE_STANDARD_ERROR
    row = subject.evaluate(grid, "validation")[rows.index(chosen)]
    seconds = sum(row["seconds"] for row in rows)
    _say(subject, chosen["theta"], len(rows), seconds)
    return _selected(row, f"{options.rule}: {words}", passes=len(rows), seconds=seconds, **difference)


def _meet(subject: Subject, budget: float, by_layer: bool) -> Selected:
    """The choice for a budget: found earlier, or searched now."""
    rule: Literal["budget", "layer-budget"] = "layer-budget" if by_layer else "budget"
    key = (subject.bits, subject.engine, rule, budget)
    searches = load_or_new(subject.run.root).get("searches", [])
    made_by = subject.fingerprint("calibration")
    known = next(
        (one for one in searches if (search_key(one), one.get("fingerprint")) == (key, made_by)), None
    )
    if known is None or subject.known(known["theta"], "calibration") is None:
        calibration = _calibration(subject)
        find = find_layer_thresholds if by_layer else find_threshold
        found = find(calibration, budget)
        subject.keep(found.theta, "calibration", found.at.scores)
        known = {
            "bits": subject.bits,
            "engine": subject.engine,
            "rule": rule,
            "budget": budget,
            "theta": found.theta,
            "execution_ratio": found.at.ratio,
            "passes": calibration.passes,
            "seconds": calibration.seconds,
            "fingerprint": made_by,
        }
        if record := perturbed(subject.model):
            known["perturbation"] = record
        kept = [one for one in searches if search_key(one) != key or _asks_others(one, made_by)]
        update_results(subject.run.root, "searches", sorted([*kept, known], key=search_key))
    _say(subject, known["theta"], known["passes"], known["seconds"])
    (row,) = subject.evaluate([known["theta"]], "validation")
    cost = {name: known[name] for name in ("passes", "seconds", "budget")}
    return _selected(row, f"{rule}: {budget_in_words(budget, by_layer)}", **cost)


def _asks_others(search: Search, made_by: Fingerprint) -> bool:
    """Whether a search rests on other questions, or asked them otherwise: neither takes the other's place."""
    found = search.get("fingerprint")
    parts: tuple[Literal["questions", "protocol"], ...] = ("questions", "protocol")
    return found is not None and any(found[part] != made_by[part] for part in parts)


def _calibration(subject: Subject) -> Calibration:
    """The calibration questions, asked with a progress bar."""
    questions, metrics = subject.data.questions("calibration"), subject.protocol("calibration")["metrics"]

    def nll(scores: Scores) -> float:
        return mean_over_tasks(accuracy_by_task(questions, scores.loglikelihoods, metrics), "nll")

    def bar(thetas: Sequence[Theta]) -> AbstractContextManager[Callable[[int], None]]:
        name = f"θ = {theta_text(thetas[0])}" if len(thetas) == 1 else f"{len(thetas)} steps of single layers"
        return progress(f"{subject}, searching: {name}", len(questions))

    return Calibration(subject.model, questions, nll, bar)


def _selected(row: Evaluation, rule: str, **found: Any) -> Selected:
    keys = ("bits", "engine", "theta", "average", "average_stderr", "average_nll", "execution_ratio")
    figures: dict[str, Any] = {key: row[key] for key in keys}  # type: ignore[literal-required]
    return cast(Selected, figures | {"rule": rule} | found)


def _say(subject: Subject, theta: float | list[float] | None, passes: int, seconds: float) -> None:
    console.print(
        f"{subject.bits:>3g} bits: θ = {theta_text(theta)} selected in {passes} passes over "
        f"{len(subject.data.questions('calibration'))} calibration questions, {seconds:.0f} s"
    )
