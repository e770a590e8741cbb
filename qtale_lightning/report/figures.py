"""A run's plots, from `results.json` and Lightning's `metrics.csv`, as PNG and PDF in `<run>/plots/`.

Markers and line styles differ as well as colours, so that the plots survive printing in grey. Figures are plain
`Figure` objects: no display, no pyplot state.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from qtale_lightning.manifest import writing
from qtale_lightning.report.notes import HALF, run_title, theta_text
from qtale_lightning.report.routing_figure import plot_routing, read_metrics
from qtale_lightning.report.style import DPI, STYLES, TRAINING_STYLE, plain
from qtale_lightning.results.schema import Evaluation, Results
from qtale_lightning.results.series import selected_row, validation_series
from qtale_lightning.results.store import load_results, same_theta

PANELS = {
    "loss": ["train/loss", "val/loss"],
    "cross-entropy, nats": ["train/ce", "val/ce"],
    "routing losses": ["train/ratio_loss", "train/entropy_loss", "train/prediction_loss"],
    "share of layers executed": ["train/execution_ratio", "val/execution_ratio", "train/target_ratio"],
    "decisions flipped by noise": ["train/flip_ratio"],
    "decisions not foreseen": ["train/prediction_error"],
    "logit gap, |execute − skip|": ["train/logit_gap"],
}
"""The panels of the training figure: the y label, and the columns of `metrics.csv` in it."""
SMOOTHED_FROM = 200
"""From so many logged values on, a curve is drawn as its rolling mean over a faint line of the values."""


def figure_title(results: Results) -> str:
    """The run, and the number of questions that its rows answered."""
    asked = sorted({row["examples"] for rows in validation_series(results).values() for row in rows})
    return f"{run_title(results)} · {' or '.join(f'{count:,}' for count in asked)} validation questions"


def plot_accuracy(results: Results) -> Figure:
    """Average accuracy (top) and nll (bottom) against the share of layers executed, a line per precision.

    Bars are one standard error; a ring marks the selected θ. Without routers the x axis is the precision.

    Raises:
        ValueError: there are no validation rows.
    """
    series = validation_series(results)
    if not series:
        raise ValueError("no validation rows to plot: 'python -m qtale_lightning evaluate <run>' makes them")
    routed = any(row["theta"] is not None for rows in series.values() for row in rows)
    # Where tasks measure different things there is no average accuracy, and the nll stands alone.
    averaged = all(row["average"] is not None for rows in series.values() for row in rows)
    figure = Figure(figsize=(7.5, 7.5 if averaged else 4.5), layout="constrained")
    figure.suptitle(plain(figure_title(results)), fontsize=11)
    panels = figure.subplots(2 if averaged else 1, 1, sharex=True, squeeze=False)[:, 0]
    top, bottom = panels[0], panels[-1]
    for position, (label, rows) in enumerate(series.items()):
        style = STYLES[position % len(STYLES)]
        rows = sorted(rows, key=lambda row: row["execution_ratio"])
        chosen = selected_row(results, rows) if len(rows) > 1 else None
        x = [row["execution_ratio"] if routed else float(position) for row in rows]
        accuracy = [100 * (row["average"] or 0.0) for row in rows]
        accuracy_error = [100 * (row["average_stderr"] or 0.0) for row in rows]
        nll = [row["average_nll"] for row in rows]
        nll_error = [row["average_nll_stderr"] for row in rows]
        shown = [(accuracy, accuracy_error), (nll, nll_error)] if averaged else [(nll, nll_error)]
        for axes, (y, error) in zip(panels, shown, strict=True):
            axes.errorbar(x, y, error, label=plain(label), capsize=2, elinewidth=0.8, markersize=5, **style)
            if chosen is not None:
                at = rows.index(chosen)
                ring = {"markersize": 13, "fillstyle": "none", "markeredgewidth": 1.8}
                axes.plot(x[at], y[at], "o", color=style["color"], **ring)
        _annotate_thetas(top, x, shown[0][0], rows, chosen, style["color"], below=position % 2 == 1)
    top.set_ylabel("average accuracy, %")
    bottom.set_ylabel("average nll, nats")
    if routed:
        top.legend(title="precision")
        top.margins(x=0.08)  # room for the θ beside the outer points
        bottom.set_xlabel(
            "share of layers executed\n(numbers: θ; ring: the selected θ; bars: one standard error)"
        )
    else:
        bottom.set_xticks(range(len(series)), map(plain, series))
        bottom.set_xlim(-0.5, len(series) - 0.5)
        bottom.set_xlabel("precision (bars: one standard error)")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    return figure


def _annotate_thetas(
    axes: Axes,
    x: list[float],
    y: list[float],
    rows: list[Evaluation],
    chosen: Evaluation | None,
    color: str,
    below: bool,
) -> None:
    """Writes θ at a line's ends, at D-LLM's 0.5 and at the selected point: more would clutter."""
    for index, row in enumerate(rows):
        end = index in (0, len(rows) - 1)
        if row["theta"] is not None and (end or row is chosen or same_theta(row["theta"], HALF)):
            axes.annotate(
                theta_text(row["theta"]),
                (x[index], y[index]),
                xytext=(7, -13) if below else (-7, 6),
                textcoords="offset points",
                horizontalalignment="left" if below else "right",
                fontsize=9,
                color=color,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
                zorder=5,
            )


def layer_curves(results: Results) -> list[tuple[str, list[float], dict[str, Any]]]:
    """Label, execution ratio per layer of shape `(layers,)` and style, for training and each selected row.

    Empty for a model whose layers all execute.
    """
    curves = []
    if routing := results.get("routing"):
        curves.append(("training", routing["execution_ratio_per_layer"], TRAINING_STYLE))
    for position, (label, rows) in enumerate(validation_series(results).items()):
        row = selected_row(results, rows)
        if row is None:
            continue
        ratios, style = row["execution_ratio_per_layer"], STYLES[position % len(STYLES)]
        if row["theta"] is not None:
            curves.append((f"{label}, θ = {theta_text(row['theta'])}", ratios, style))
        elif min(ratios, default=1.0) < 1:
            curves.append((label, ratios, style))
    return [curve for curve in curves if curve[1]]


def plot_layers(results: Results) -> Figure:
    """The share of tokens that execute each layer, in training and at each precision's selected θ.

    Raises:
        ValueError: there are no execution ratios per layer.
    """
    curves = layer_curves(results)
    if not curves:
        raise ValueError(
            "no execution ratios per layer to plot: the model skips no layer, or no row was selected"
        )
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    figure.suptitle(plain(figure_title(results)), fontsize=11)
    axes = figure.subplots()
    for label, values, style in curves:
        axes.plot(
            range(len(values)), values, label=plain(label), drawstyle="steps-mid", markersize=4, **style
        )
    axes.set_ylim(-0.03, 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("share of tokens that execute it")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(4, len(curves)))
    return figure


def plot_losses(metrics_csv: str | Path, title: str = "") -> Figure:
    """Losses and routing over training steps, a panel for each of `PANELS` that was logged.

    `metrics_csv` is what Lightning's CSVLogger writes: a row per logging call, empty where it had no value.

    Raises:
        DamagedFileError: as `read_metrics`.
        ValueError: it has no column that a panel shows.
    """
    metrics = read_metrics(Path(metrics_csv))
    panels = _logged_panels(metrics)
    if not panels:
        raise ValueError(
            f"{metrics_csv}: needs values of some of {', '.join(_columns(PANELS))}; "
            f"its columns are {', '.join(metrics.columns)}"
        )
    smoothed = any(len(metrics[column].dropna()) >= SMOOTHED_FROM for column in _columns(panels))
    line_count = -(-len(panels) // 2)
    columns = min(2, len(panels))
    figure = Figure(figsize=(5 * columns, 2.7 * line_count), layout="constrained")
    figure.suptitle(plain(title), fontsize=11)
    cells = figure.subplots(line_count, columns, squeeze=False, sharex=True).flat
    for axes, (name, shown) in zip(cells, panels.items(), strict=False):
        for style, column in zip(STYLES, shown, strict=False):
            values = metrics[["step", column]].dropna().sort_values("step")
            _plot_curve(axes, values["step"], values[column], column, style)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in list(figure.axes)[len(panels) :]:
        axes.remove()
    for axes in figure.axes[-columns:]:
        axes.set_xlabel("step (faint: logged values; bold: their rolling mean)" if smoothed else "step")
        axes.tick_params(labelbottom=True)
    return figure


def _logged_panels(metrics: pd.DataFrame) -> dict[str, list[str]]:
    """`PANELS`, without the columns that hold no value and the panels that then are empty."""
    logged = {
        name: [column for column in columns if column in metrics and metrics[column].notna().any()]
        for name, columns in PANELS.items()
    }
    return {name: columns for name, columns in logged.items() if columns}


def _columns(panels: dict[str, list[str]]) -> list[str]:
    return [column for columns in panels.values() for column in columns]


def _plot_curve(axes: Axes, steps: pd.Series, values: pd.Series, label: str, style: dict[str, Any]) -> None:
    color, linestyle = style["color"], style["linestyle"]
    if len(values) < SMOOTHED_FROM:
        # A validation curve of a short run can be a single point, which only a marker shows.
        marker = style["marker"] if len(values) <= 30 else None
        axes.plot(steps, values, label=label, color=color, linestyle=linestyle, marker=marker, markersize=4)
        return
    mean = values.rolling(len(values) // 20, center=True, min_periods=1).mean()
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.7)
    axes.plot(steps, mean, label=label, color=color, linestyle=linestyle)


def write_figures(run_dir: str | Path) -> list[Path]:
    """Writes the figures that a run has data for to `<run_dir>/plots/`, and returns the files.

    Raises:
        FileNotFoundError, ValueError: as `load_results` and `plot_losses`.
    """
    run_dir = Path(run_dir)
    results = load_results(run_dir)
    figures = {}
    if validation_series(results):
        figures["accuracy"] = plot_accuracy(results)
    if layer_curves(results):
        figures["layers"] = plot_layers(results)
    metrics_csv = run_dir / "metrics.csv"
    metrics = read_metrics(metrics_csv)
    if _logged_panels(metrics):
        figures["losses"] = plot_losses(metrics_csv, run_title(results))
    if routing := plot_routing(results, metrics):
        figures["routing"] = routing
    written = []
    for name, figure in figures.items():
        for kind in ("png", "pdf"):
            path = run_dir / "plots" / f"{name}.{kind}"
            with writing(run_dir, path) as temporary:
                figure.savefig(temporary, format=kind, dpi=DPI)
            written.append(path)
    return written
