"""Evaluation of a run's models at each precision and θ, and the θ that is selected."""

import time
from collections.abc import Sequence
from typing import Literal

from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.evaluation import cost
from qtale_lightning.evaluation.accuracy import accuracy_by_task, mean_error, mean_over_tasks
from qtale_lightning.evaluation.scoring import score
from qtale_lightning.evaluation.threshold import RULE, RULE_IN_WORDS, select
from qtale_lightning.models.modeling import RoutedLlamaForCausalLM
from qtale_lightning.report.results import Evaluation, load_results, update_results, upsert_evaluation
from qtale_lightning.run import RunDirectory
from qtale_lightning.stages.export import load_exported
from qtale_lightning.stages.progress import console, progress


def evaluate(
    run: RunDirectory,
    data: CommonsenseDataModule,
    model: RoutedLlamaForCausalLM,
    bits: float,
    engine: str,
    theta: float | None,
    split: Literal["calibration", "validation"],
) -> Evaluation:
    """Score a split at one precision and θ, and keep the row in ``results.json``; a row already there is returned."""
    engine = "none" if bits == 16 else engine
    questions = data.questions(split)
    protocol = data.protocol() | {"scoring": "log-likelihood", "execution": "packed"}
    for known in load_results(run.root)["evaluation"]:
        key = (known["bits"], known["engine"], known["theta"], known["split"], known["examples"])
        if key == (bits, engine, theta, split, len(questions)) and known["protocol"] == protocol:
            return known
    theta_text = "" if theta is None else f", θ = {theta:g}"
    with progress(f"{bits:g} bits{theta_text}, {split}", len(questions)) as advance:
        started = time.perf_counter()
        scores = score(model, questions, theta, on_progress=advance)
        seconds = time.perf_counter() - started
    accuracy = accuracy_by_task(questions, scores.loglikelihoods, protocol["metrics"])
    context = (
        sum(len(c) for q in questions for c in q.contexts) / sum(len(q.contexts) for q in questions) + 1
    ) / 2
    row: Evaluation = {
        "bits": bits,
        "engine": engine,
        "theta": theta,
        "split": split,
        "examples": len(questions),
        "execution_ratio": sum(scores.execution) / len(scores.execution),
        "execution_ratio_per_layer": scores.execution,
        "flops_ratio": cost.flops_ratio(model.config, scores.execution, context),
        "accuracy": accuracy,
        "average": mean_over_tasks(accuracy, "value"),
        "average_stderr": mean_error(accuracy, "stderr"),
        "average_nll": mean_over_tasks(accuracy, "nll"),
        "average_nll_stderr": mean_error(accuracy, "nll_stderr"),
        "weight_bytes": run.weight_bytes(bits, engine),
        "seconds": seconds,
        "protocol": protocol,
    }
    upsert_evaluation(run.root, row)
    if split == "validation":
        console.print(
            f"{bits:>3g} bits{theta_text}: accuracy {100 * row['average']:.1f} ± {100 * row['average_stderr']:.1f} %, "
            f"nll {row['average_nll']:.3f}, execution ratio {row['execution_ratio']:.3f}, {seconds:.0f} s"
        )
    return row


def sweep(
    run: RunDirectory,
    data: CommonsenseDataModule,
    bits: Sequence[float],
    engine: str,
    thresholds: Sequence[float],
) -> None:
    """Every precision × every θ, on calibration and validation questions; then the θ of each precision.

    θ is selected on calibration questions, which come from the training split and were not trained on; what it
    gives is then read off the validation questions. A model without routers has one row a precision, and no θ.
    """
    selected = []
    for b in (16, *sorted(bits, reverse=True)):
        model = load_exported(run, b, engine)
        grid: list[float | None] = (
            [*sorted(thresholds, reverse=True)] if model.config.routed_layers else [None]
        )
        validation = {theta: evaluate(run, data, model, b, engine, theta, "validation") for theta in grid}
        if grid == [None]:
            chosen, rule = validation[None], "no routers"
        else:
            rows = [evaluate(run, data, model, b, engine, theta, "calibration") for theta in grid]
            chosen, rule = validation[select(rows)["theta"]], f"{RULE}: {RULE_IN_WORDS}"
        means = {key: chosen[key] for key in ("average", "average_stderr", "average_nll", "execution_ratio")}
        selected.append({key: chosen[key] for key in ("bits", "engine", "theta")} | means | {"rule": rule})
    others = [row for row in load_results(run.root)["selected"] if row.get("engine") not in ("none", engine)]
    update_results(run.root, "selected", [*selected, *others])
