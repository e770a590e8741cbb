"""What a run's results say in words: the scoring protocol, which differences are noise, and what it cost."""

import math
from collections.abc import Iterable

from qtale_lightning.results.fingerprints import unidentified
from qtale_lightning.results.schema import Evaluation, Results
from qtale_lightning.results.series import best_row, selected_row, validation_series
from qtale_lightning.results.store import same_theta
from qtale_lightning.routing import METHODS, Method
from qtale_lightning.tasks import task_title

HALF = 0.5
"""θ of the likelier decision, argmax over (skip, execute): what a selected θ is compared with."""

NOISE_RULE = (
    "A difference counts as within noise when it is at most two standard errors, where the standard error of "
    "a difference is √(se₁² + se₂²). Both rows answer the same questions, so this is usually too wide: "
    "'within noise' means that these questions can't tell the two apart, not that they are equal. The best "
    "row is chosen on the questions it is scored on, which flatters it."
)
COST_RULE = (
    "Counted FLOPs and measured seconds are different things: FLOPs are counted from the layers that "
    "executed, routers included, as a share of the base model's; seconds are the wall-clock time of the "
    "evaluation on the hardware above."
)


def run_title(results: Results) -> str:
    """Such as "smollm2-135m · qtale · csqa · seed 0"."""
    run = results.get("run")
    return f"{run['model']} · {run['method']} · {run['data']} · seed {run['seed']}" if run else "unnamed run"


def theta_text(theta: float | list[float] | None) -> str:
    """θ as text: a dash for a model without routers, the lowest and the highest where every layer has its own."""
    if isinstance(theta, list):
        low, high = (f"{one:.2g}" if one >= 0.001 else f"{one:.1g}" for one in (min(theta), max(theta)))
        return f"{low}…{high} by layer"
    return "–" if theta is None else f"{theta:g}"


def protocol_lines(results: Results) -> list[str]:
    """How the run's validation rows were scored. They agree in all that a score depends on, not in where rows lay."""
    rows = [row for series in validation_series(results).values() for row in series]
    if not rows:
        return []
    metrics: dict[str, set[str]] = {}
    for row in rows:
        for task, score in row["accuracy"].items():
            reported = f"{score['metric']} on {score['examples']:,} questions"
            metrics.setdefault(f"{task_title(task)} reports", set()).add(reported)
    settings: dict[str, set[str]] = {"questions": {f"{row['examples']:,}" for row in rows}} | metrics
    if reasons := {row["no_average"] for row in rows if "no_average" in row}:
        settings["no average"] = reasons
    for key in dict.fromkeys(key for row in rows for key in row["protocol"]):
        settings[key] = {str(row["protocol"].get(key, "not recorded")) for row in rows}
    lines = [f"{key}: {' or '.join(sorted(values))}" for key, values in settings.items()]
    if unknown := unidentified(rows):
        lines.append(
            f"fingerprints: {unknown} of {len(rows)} rows have none of this version, so that they don't say by what "
            "they were made: they are measured again where they are asked for"
        )
    return lines + quantization_lines(rows)


def quantization_lines(rows: Iterable[Evaluation]) -> list[str]:
    """How each precision of the rows was made, as far as they say it."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        fingerprint = row.get("fingerprint")
        if fingerprint and (made := fingerprint.get("quantization")):
            calibration = made["calibration"]
            settings = {
                name: value for name, value in made.items() if name not in _NO_SETTINGS and value != {}
            }
            if calibration:
                settings["sequences"] = calibration["sequences"]
            said = ", ".join(f"{name} {value}" for name, value in sorted(settings.items()))
            found.setdefault(f"{row['bits']:g} bits, {made['engine']}", {})[said] = None
    return [f"{name}: {said}" for name, ways in found.items() for said in ways]


_NO_SETTINGS = ("format", "model", "calibration", "bits", "engine")


def noise_notes(results: Results) -> list[str]:
    """Which differences these questions can tell from noise (`NOISE_RULE`): the selected θ of each precision
    against θ = 0.5 and against its best row, and each precision against the highest one."""
    notes = []
    chosen_rows: dict[str, Evaluation] = {}
    for label, rows in validation_series(results).items():
        chosen = selected_row(results, rows)
        if chosen is None:
            continue
        theta = f", θ = {theta_text(chosen['theta'])}" if chosen["theta"] is not None else ""
        chosen_rows[f"{label}{theta}"] = chosen
        if len(rows) == 1:
            continue
        subject = f"{label}, selected θ = {theta_text(chosen['theta'])}"
        for name, other in _references(rows, _at_half(results)):
            verdict = f" is {name}" if other is chosen else f" against {name}: {_difference(chosen, other)}"
            notes.append(f"{subject}{verdict}.")
    labels = list(chosen_rows)
    for label in labels[1:]:
        difference = _difference(chosen_rows[label], chosen_rows[labels[0]])
        notes.append(f"{label} against {labels[0]}: {difference}.")
    return notes


def _at_half(results: Results) -> str:
    """What the run's method calls deciding at θ = 0.5."""
    name = results["run"]["method"] if "run" in results else ""
    return f"{METHODS.get(name, Method).at_half} (θ = {HALF:g})"


def _references(rows: list[Evaluation], at_half: str) -> list[tuple[str, Evaluation]]:
    """What a selected row is held against: the decision at θ = 0.5, where it was evaluated, and the best row."""
    best = best_row(rows)
    argmax = next((row for row in rows if same_theta(row["theta"], HALF)), None)
    if argmax is best:
        return [(f"{at_half}, the best row", best)]
    references = [(f"the best row (θ = {theta_text(best['theta'])})", best)]
    return references if argmax is None else [(at_half, argmax), *references]


def _difference(row: Evaluation, other: Evaluation) -> str:
    nll = row["average_nll"] - other["average_nll"]
    nll_error = math.hypot(row["average_nll_stderr"], other["average_nll_stderr"])
    text = f"NLL {nll:+.4f} (standard error {nll_error:.4f}), {_verdict(nll, nll_error)}"
    values = row["average"], other["average"], row["average_stderr"], other["average_stderr"]
    if any(value is None for value in values):
        return text
    average, reference, error, reference_error = (100 * value for value in values if value is not None)
    accuracy, accuracy_error = average - reference, math.hypot(error, reference_error)
    return (
        f"accuracy {accuracy:+.2f} points (standard error {accuracy_error:.2f}), "
        f"{_verdict(accuracy, accuracy_error)}; {text}"
    )


def _verdict(difference: float, error: float) -> str:
    return "beyond noise" if abs(difference) > 2 * error else "within noise"


def cost_notes(results: Results) -> list[str]:
    """Counted FLOPs and measured seconds of each precision's selected row, against its most executing row."""
    notes = []
    for label, rows in validation_series(results).items():
        chosen = selected_row(results, rows)
        if chosen is None:
            continue
        note = f"{label}: {chosen['flops_ratio']:.3f} of the base model's FLOPs, counted"
        note += f"; {chosen['seconds']:,.1f} s, measured"
        densest = max(rows, key=lambda row: row["execution_ratio"])
        if densest is not chosen:
            note += f" ({densest['seconds']:,.1f} s at θ = {theta_text(densest['theta'])}, where "
            note += f"{densest['execution_ratio']:.3f} of the layers execute)"
        notes.append(f"{note}.")
    return notes
