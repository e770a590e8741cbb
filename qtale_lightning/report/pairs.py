"""Runs on the same questions, against the first of them: differences paired by question, with their 95 % intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from qtale_lightning.evaluation.statistics import RESAMPLES, Estimate
from qtale_lightning.report.markdown import bold
from qtale_lightning.report.notes import theta_text
from qtale_lightning.report.tables import FactTable
from qtale_lightning.results.predictions import compare_predictions, load_predictions
from qtale_lightning.results.schema import Evaluation, Results
from qtale_lightning.results.series import selected_row, series_of


def paired_table(run_dirs: Sequence[str | Path], runs: Sequence[Results]) -> FactTable:
    """Each run against the first, at each precision and its selected θ; only where both kept their predictions.

    Raises:
        ValueError: Predictions are damaged, or those of other questions.
    """
    table = FactTable(
        "Differences, paired by question",
        ["method", "precision", "accuracy, points", "accuracy, 95 %", "NLL, nats", "NLL, 95 %"],
        caption=f"By bootstrap over questions within tasks ({RESAMPLES:,} resamples), each task of equal weight; bold "
        "where the interval leaves 0 out. At each precision's selected θ.",
    )
    first, *others = (_chosen(run, series) for run, series in zip(runs, series_of(runs), strict=True))
    for run_dir, run, chosen in zip(run_dirs[1:], runs[1:], others, strict=True):
        for label, row in chosen.items():
            if label not in first:
                continue
            ours = load_predictions(run_dir, row)
            theirs = load_predictions(run_dirs[0], first[label])
            if ours is None or theirs is None:
                continue
            cells = []
            if row["average"] is not None:
                cells += _cells(compare_predictions(ours, theirs, "value"), 100, 2)
            else:
                cells += ["–", "–"]
            cells += _cells(compare_predictions(ours, theirs, "nll"), 1, 4)
            table.rows.append([f"{_name(run, row)} − {_name(runs[0], first[label])}", label, *cells])
    return table


def _chosen(run: Results, series: Mapping[str, list[Evaluation]]) -> dict[str, Evaluation]:
    """The row at each precision's selected θ."""
    chosen = {label: selected_row(run, rows) for label, rows in series.items()}
    return {label: row for label, row in chosen.items() if row is not None}


def _name(run: Results, row: Evaluation) -> str:
    method = run["run"]["method"]
    return method if row["theta"] is None else f"{method}, θ = {theta_text(row['theta'])}"


def _cells(difference: Estimate, factor: float, digits: int) -> list[str]:
    value = f"{factor * difference.value:+.{digits}f} ± {factor * difference.stderr:.{digits}f}"
    interval = f"{factor * difference.low:+.{digits}f} to {factor * difference.high:+.{digits}f}"
    return [bold(value) if difference.significant else value, interval]
