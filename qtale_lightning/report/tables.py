"""A run's results as a data frame, as tables in the terminal, and as `<run>/results.md`.

The terminal and the page show the same tables: built once as text (`FactTable`), rendered twice.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.markup import escape

from qtale_lightning.manifest import writing
from qtale_lightning.report import markdown
from qtale_lightning.report.notes import (
    COST_RULE,
    NOISE_RULE,
    cost_notes,
    noise_notes,
    protocol_lines,
    run_title,
    theta_text,
)
from qtale_lightning.report.scores import score_header, score_text
from qtale_lightning.report.terminal import FactTable, print_table
from qtale_lightning.results.schema import Evaluation, Results
from qtale_lightning.results.scores import ChoiceScores, TextScores
from qtale_lightning.results.series import (
    best_row,
    labels_of,
    other_rows,
    perturbation_of,
    selected_choice,
    selected_row,
    validation_series,
)
from qtale_lightning.results.store import load_results
from qtale_lightning.routing.perturbation import in_words
from qtale_lightning.tasks import task_title

CAPTIONS = {
    "accuracy": "Accuracy and negative log-likelihood against the share of layers executed.",
    "layers": "Share of tokens that execute each layer.",
    "losses": "Losses and routing during training.",
}
COST_COLUMNS = ["layers executed", "counted FLOPs", "measured s"]


def evaluation_frame(results: Results) -> pd.DataFrame:
    """The validation rows, one per bits, engine and θ (NaN: a model without routers, or with a θ for each layer).

    Tasks, `average` and `average_stderr` are in percent (NaN: tasks measure different things), perplexities as they
    are, ratios are fractions, `nll` in nats, `weight_mb` in 10⁶ bytes, `seconds` measured.
    """
    rows = []
    for series in validation_series(results).values():
        chosen = selected_row(results, series)
        for row in series:
            rows.append(
                {
                    "bits": row["bits"],
                    "engine": row["engine"],
                    "theta": row["theta"] if isinstance(row["theta"], float | int) else math.nan,
                    "execution_ratio": row["execution_ratio"],
                    "flops_ratio": row["flops_ratio"],
                    **{task: _shown(score) for task, score in row["accuracy"].items()},
                    "average": math.nan if row["average"] is None else 100 * row["average"],
                    "average_stderr": math.nan
                    if row["average_stderr"] is None
                    else 100 * row["average_stderr"],
                    "nll": row["average_nll"],
                    "weight_mb": row["weight_bytes"] / 1e6,
                    "seconds": row["seconds"],
                    "selected": row is chosen,
                }
            )
    return pd.DataFrame(rows)


def run_table(results: Results) -> FactTable:
    """What ran: command, commit, hardware, versions."""
    table = FactTable("Run", ["what", "value"])
    if run := results.get("run"):
        git = run["git"]
        changed = " (with uncommitted changes)" if git and git["dirty"] else ""
        table.rows = [
            ["command", markdown.code(run["command"])],
            ["commit", f"{git['commit']}{changed}" if git else "none (outside a git repository)"],
            ["hardware", run["hardware"]],
            *([["precision of training", run["precision"]]] if "precision" in run else []),
            ["versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())],
        ]
    return table


def training_table(results: Results) -> FactTable:
    """Training facts, the last losses, and how the routers decide."""
    table = FactTable("Training", ["what", "value"])
    if train := results.get("train"):
        table.rows += [
            ["steps", f"{train['steps']:,}"],
            ["examples", f"{train['examples']:,}"],
            ["tokens", f"{train['tokens']:,}"],
            ["measured time", f"{train['seconds']:,.1f} s"],
            ["measured throughput", f"{train['tokens_per_second']:,.0f} tokens/s"],
            ["trainable parameters", f"{train['trainable_parameters']:,}"],
            *(
                ["λ1 at the end" if name == "lambda_ratio" else f"final loss: {name}", f"{value:.4f}"]
                for name, value in train["final_losses"].items()
            ),
        ]
    if routing := results.get("routing"):
        if "flip_ratio" in routing:
            table.rows.append(["decisions flipped by Gumbel noise", f"{100 * routing['flip_ratio']:.2f} %"])
        if "prediction_error" in routing:
            error = f"{100 * routing['prediction_error']:.2f} %"
            table.rows.append(["decisions that routers don't foresee", error])
        if "logit_gap" in routing:
            table.rows.append(["logit gap, |execute − skip|", f"{routing['logit_gap']:.3f}"])
        if "entropy" in routing:
            table.rows.append(["routing entropy", f"{routing['entropy']:.3f} nats"])
    return table


def selection_table(results: Results) -> FactTable:
    """The validation row at each precision's selected θ, and the rule that selected it."""
    headers = ["precision", "θ", *COST_COLUMNS, "weights MB", "average %", "NLL"]
    table = FactTable("Selected threshold", headers)
    rules: dict[str, list[str]] = {}
    for label, rows in validation_series(results).items():
        for row in rows:
            if choice := selected_choice(results, row):
                rules.setdefault(choice["rule"], []).append(label)
                averages = [_average(row), f"{row['average_nll']:.3f}"]
                table.rows.append([label, *_cells(row), f"{row['weight_bytes'] / 1e6:,.1f}", *averages])
    table.caption = "; ".join(f"{', '.join(labels)}: {rule}" for rule, labels in rules.items())
    return table


def search_table(results: Results) -> FactTable:
    """What selecting each θ took, and what the rule went by besides the average."""
    table = FactTable("Cost of selecting θ", ["precision", "rule", "θ", "passes", "measured s"])
    choices = [choice for choice in results["selected"] if "passes" in choice]
    compared = any("difference" in choice for choice in choices)
    if compared:
        table.headers.append("to θ=0, points")
    for choice in choices:
        rule = choice["rule"].split(":")[0] + (f" {choice['budget']:g}" if "budget" in choice else "")
        cells = [theta_text(choice["theta"]), f"{choice['passes']}", f"{choice.get('seconds', 0):,.1f}"]
        if compared and (found := choice.get("difference")):
            low, high = 100 * found["low"], 100 * found["high"]
            cells.append(f"{100 * found['value']:+.2f} [{low:+.2f}, {high:+.2f}]")
        elif compared:
            cells.append("–")
        engine = "" if choice["bits"] == 16 or "engine" not in choice else f" {choice['engine']}"
        table.rows.append([f"{choice['bits']}-bit{engine}", rule, *cells])
    table.caption = (
        "Passes over the calibration questions, in the seconds that they took when they were made"
        + (
            "; the accuracy difference to full execution with its 95 % interval, paired by question"
            if compared
            else ""
        )
    )
    return table


def evaluation_table(results: Results, brief: bool = False) -> FactTable:
    """Every validation row, with the selected one and the best average of each precision marked.

    `brief` leaves out the tasks, where they have an average, and the error of the nll, to fit a terminal.
    """
    series = validation_series(results)
    averaged = any(row["average"] is not None for rows in series.values() for row in rows)
    columns = {} if brief and averaged else _task_columns([row for rows in series.values() for row in rows])
    headers = ["precision", "θ", *COST_COLUMNS, *columns, "average %", "NLL", "mark"]
    table = FactTable("Evaluation on the validation split", headers)
    for label, rows in series.items():
        best = best_row(rows)
        for row in rows:
            selected = selected_choice(results, row) is not None
            if selected:
                table.emphasized.add(len(table.rows))
            marks = ["selected"] * selected + ["best"] * (row is best and len(rows) > 1)
            scores = [cell(row) for cell in columns.values()]
            nll = f"{row['average_nll']:.3f}" + ("" if brief else f" ± {row['average_nll_stderr']:.3f}")
            table.rows.append([label, *_cells(row), *scores, _average(row), nll, " and ".join(marks)])
    return table


def others_table(results: Results) -> FactTable:
    """Validation rows of other questions than the run's own, or asked otherwise: looks that stand for nothing else."""
    headers = ["questions", "precision", "θ", *COST_COLUMNS, "average %", "NLL"]
    table = FactTable("Other questions than the run's own", headers)
    rows = other_rows(results)
    for row, label in zip(rows, labels_of(rows), strict=True):
        nll = f"{row['average_nll']:.3f} ± {row['average_nll_stderr']:.3f}"
        label = ", ".join(part for part in (label, in_words(perturbation_of(row))) if part)
        table.rows.append([f"{row['examples']:,}", label, *_cells(row), _average(row), nll])
    table.caption = "Other rows, or asked otherwise: they don't compare with those above"
    return table


def _cells(row: Evaluation) -> list[str]:
    ratios = [f"{row['execution_ratio']:.3f}", f"{row['flops_ratio']:.3f}"]
    return [theta_text(row["theta"]), *ratios, f"{row['seconds']:,.1f}"]


def _task_columns(rows: Sequence[Evaluation]) -> dict[str, Callable[[Evaluation], str]]:
    """Heading → cell of a row, for each task, and for the share of its written answers that can't be read."""
    columns: dict[str, Callable[[Evaluation], str]] = {}
    for row in rows:
        for task, score in row["accuracy"].items():
            name = task_title(task)
            columns.setdefault(score_header(name, score["metric"]), partial(_task_cell, task))
            if score["metric"] == "acc_generated":
                columns.setdefault(f"{name} unreadable %", partial(_unreadable_cell, task))
    return columns


def _task_cell(task: str, row: Evaluation) -> str:
    score = row["accuracy"].get(task)
    return score_text(score) if score else "–"


def _unreadable_cell(task: str, row: Evaluation) -> str:
    score = row["accuracy"].get(task)
    return f"{100 * score['unreadable']:.2f}" if score and score["metric"] == "acc_generated" else "–"


def _average(row: Evaluation) -> str:
    if row["average"] is None or row["average_stderr"] is None:
        return "–"
    return f"{100 * row['average']:.2f} ± {100 * row['average_stderr']:.2f}"


def _shown(score: ChoiceScores | TextScores) -> float:
    return score["value"] if score["metric"] == "perplexity" else 100 * score["value"]


def print_summary(results: Results, console: Console | None = None) -> None:
    """Prints what ran, training facts, the selected θ per precision, all rows, and the notes on noise."""
    console = console or Console()
    console.rule(f"[bold]{escape(run_title(results))}")
    for table in (
        run_table(results),
        training_table(results),
        selection_table(results),
        search_table(results),
        evaluation_table(results, brief=True),
        others_table(results),
    ):
        if table.rows:
            print_table(table, console)
    for note in noise_notes(results):
        console.print(f"• {note}", markup=False, highlight=False)


def page(results: Results, plots: Sequence[str] = ()) -> str:
    """The text of `results.md`; `plots` are the figures to embed, as paths relative to the page."""
    parts = [f"# {markdown.escape(run_title(results))}"]
    for table in (run_table(results), training_table(results)):
        if table.rows:
            parts += [f"## {table.title}", markdown.table(table.headers, table.rows)]
    if protocol := protocol_lines(results):
        parts += ["## Protocol", markdown.bullets(protocol)]
    for table, lead in (
        (selection_table(results), "Rule: "),
        (search_table(results), ""),
        (evaluation_table(results), ""),
        (others_table(results), ""),
    ):
        if table.rows:
            parts += [f"## {table.title}", markdown.table(table.headers, table.rows)]
            parts += [f"{lead}{markdown.escape(table.caption)}."] if table.caption else []
    if noise := noise_notes(results):
        parts += ["## What is noise and what isn't", NOISE_RULE, markdown.bullets(noise)]
    if costs := cost_notes(results):
        parts += ["## Cost", COST_RULE, markdown.bullets(costs)]
    if plots:
        parts.append("## Plots")
        parts += [f"![{CAPTIONS.get(Path(plot).stem, Path(plot).stem)}]({plot})" for plot in plots]
    return "\n\n".join(parts) + "\n"


def write_markdown(run_dir: str | Path) -> Path:
    """Writes `<run_dir>/results.md` from `results.json` and the plots that are there, and returns its path.

    Raises:
        FileNotFoundError, ValueError: as `load_results`.
    """
    run_dir = Path(run_dir)
    plots = [f"plots/{name}.png" for name in CAPTIONS if (run_dir / "plots" / f"{name}.png").is_file()]
    text = page(load_results(run_dir), plots)
    with writing(run_dir, run_dir / "results.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return run_dir / "results.md"
