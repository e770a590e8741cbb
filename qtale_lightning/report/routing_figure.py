"""The figure of a run's routers: how firmly they decide, what turns their decisions, how diverse paths become."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qtale_lightning.manifest import DamagedFileError, verify
from qtale_lightning.report.notes import run_title
from qtale_lightning.report.style import STYLES, TRAINING_STYLE, plain
from qtale_lightning.results.routing import Changes, HistogramCounts, Routing
from qtale_lightning.results.schema import Results
from qtale_lightning.results.store import same_theta

PATHS = {"paths": "as inference decides", "noisy_paths": "as Gumbel noise decides"}
CURVES = {"distinct": "distinct paths", "entropy": "entropy of paths, nats"}
SAMPLE = "_of_500"
"""Ends the names of columns that were brought to one number of tokens, which are preferred: they can be compared."""


def plot_routing(results: Results, metrics: pd.DataFrame) -> Figure | None:
    """Logit gaps and p(execute), flips and changed decisions by layer, diversity of paths over training.

    Args:
        results: A panel whose numbers they lack is left out.
        metrics: Of `metrics.csv`: the diversity of paths at every validation.

    Returns:
        None where no panel is left, as for a model without routers.
    """
    panels = [
        *_histogram_panels(results.get("routing")),
        *_layer_panels(results),
        *_diversity_panels(metrics),
    ]
    if not panels:
        return None
    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 2.9 * lines), layout="constrained")
    figure.suptitle(plain(f"{run_title(results)} · routers"), fontsize=11)
    cells = list(figure.subplots(lines, 2, squeeze=False).flat)
    for axes, draw in zip(cells, panels, strict=False):
        draw(axes)
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    for axes in cells[len(panels) :]:
        axes.remove()
    return figure


Panel = Callable[[Axes], None]


def _histogram_panels(routing: Routing | None) -> list[Panel]:
    histograms = routing.get("histograms", {}) if routing else {}
    labels = {
        "logit_gap": ("logit gap, execute − skip (outer bins: all beyond)", 0.0),
        "probability": ("p(execute)", 0.5),
    }

    def panel(name: str, histogram: HistogramCounts) -> Panel:
        def draw(axes: Axes) -> None:
            label, middle = labels[name]
            total = max(1, sum(histogram["counts"]))
            shares = [count / total for count in histogram["counts"]]
            axes.stairs(shares, histogram["edges"], fill=True, alpha=0.75, color=STYLES[0]["color"])
            axes.axvline(middle, color="black", linewidth=1, linestyle="--", label="θ = 0.5")
            axes.set_xlabel(label)
            axes.set_ylabel("share of decisions")
            axes.legend(fontsize=8)

        return draw

    return [panel(name, histograms[name]) for name in labels if name in histograms]


def _layer_panels(results: Results) -> list[Panel]:
    panels: list[Panel] = []
    flips = results["routing"].get("flip_ratio_per_layer", []) if "routing" in results else []

    def curve(axes: Axes, values: list[float | None], label: str, style: dict[str, object]) -> None:
        drawn = [float("nan") if value is None else value for value in values]
        axes.plot(range(len(drawn)), drawn, label=label, markersize=4, **style)  # type: ignore[arg-type]
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.legend(fontsize=8)

    def draw_flips(axes: Axes) -> None:
        curve(axes, flips, "last training batches", TRAINING_STYLE)
        axes.set_ylabel("decisions flipped by noise")

    def draw_changes(axes: Axes) -> None:
        for style, row in zip(STYLES[1:], _compared(results), strict=False):
            curve(axes, row["changed_per_layer"], f"{row['bits']:g} bits, θ = {row['theta']:g}", style)
        axes.set_ylabel("decisions unlike 16 bits")

    if flips:
        panels.append(draw_flips)
    if _compared(results):
        panels.append(draw_changes)
    return panels


def _compared(results: Results) -> list[Changes]:
    """The quantized rows of `changes`, at the highest θ: one line a precision, that of the most questions."""
    rows = [row for row in results.get("changes", []) if row["bits"] != 16]
    highest = max((row["theta"] for row in rows), default=0.0)
    chosen: dict[tuple[float, str], Changes] = {}
    for row in sorted(rows, key=lambda row: -row["examples"]):
        if same_theta(row["theta"], highest):
            chosen.setdefault((row["bits"], row["engine"]), row)
    return sorted(chosen.values(), key=rows.index)


def _diversity_panels(metrics: pd.DataFrame) -> list[Panel]:
    panels: list[Panel] = []
    for name, label in CURVES.items():
        columns = {kind: f"val/{kind}/{name}" for kind in PATHS if f"val/{kind}/{name}" in metrics}
        sampled = all(f"{column}{SAMPLE}" in metrics for column in columns.values())
        if sampled:
            columns = {kind: f"{column}{SAMPLE}" for kind, column in columns.items()}
        columns = {
            kind: column
            for kind, column in columns.items()
            if column in metrics and metrics[column].notna().any()
        }
        if not columns:
            continue

        def draw(
            axes: Axes, columns: dict[str, str] = columns, label: str = label, sampled: bool = sampled
        ) -> None:
            for style, (kind, column) in zip(STYLES, columns.items(), strict=False):
                values = metrics[["step", column]].dropna()
                axes.plot(values["step"], values[column], label=PATHS[kind], markersize=4, **style)
            axes.set_ylabel(f"{label}\nof 500 tokens" if sampled else label)
            axes.set_xlabel("step (each validation, on held-out training rows)")
            axes.legend(fontsize=8)

        panels.append(draw)
    return panels


def read_metrics(path: Path) -> pd.DataFrame:
    """A run's `metrics.csv`; an empty table where there is none.

    Raises:
        DamagedFileError: It isn't what the run wrote, or no table of numbers with a column `step`.
    """
    if not path.is_file():
        return pd.DataFrame()
    remedy = f"`python -m qtale_lightning report {path.parent}` makes it anew from logs/"
    verify(path.parent, path, remedy)
    if not path.read_bytes().strip():
        return pd.DataFrame()  # a run that logged nothing
    try:
        metrics = pd.read_csv(path)
    except (ValueError, RecursionError) as error:  # pandas' own errors are ValueErrors
        raise DamagedFileError(f"{path} is no table ({error}): {remedy}") from error
    if "step" not in metrics:
        raise DamagedFileError(f"{path} has no column 'step': {remedy}")
    if text := [str(name) for name in metrics if not pd.api.types.is_numeric_dtype(metrics[name])]:
        raise DamagedFileError(f"{path} has other values than numbers in {', '.join(text[:3])}: {remedy}")
    return metrics
