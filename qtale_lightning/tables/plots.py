"""How a table's figures are drawn. Colours, markers and lines differ together, so that grey prints can be read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

from qtale_lightning.report.style import STYLES

RING = {"marker": "o", "markersize": 12, "fillstyle": "none", "color": "#555555", "linestyle": "none"}


@dataclass(frozen=True)
class Point:
    """A curve's: execution ratio, then value and standard error of accuracy (percent; None: there is no average) and of
    nll (nats)."""

    ratio: float
    accuracy: tuple[float, float] | None
    nll: tuple[float, float]


Curves = Mapping[str, Sequence[Point]]
"""Points by label, ratio ascending."""
Styles = Mapping[str, dict[str, Any]]
"""How each label is drawn: alike in all figures of a table."""


def style_of(position: int) -> dict[str, Any]:
    """The style of the curve at a position; the second dozen has hollow markers."""
    style = dict(STYLES[position % len(STYLES)])
    return style if position < len(STYLES) else style | {"markerfacecolor": "white"}


def pareto(points: Sequence[tuple[float, float]], higher: bool) -> list[int]:
    """Indices of the (cost, value) points that no other beats: none costs as little or less and is better."""
    sign = 1 if higher else -1
    return [
        i
        for i, (cost, value) in enumerate(points)
        if not any(
            other_cost <= cost
            and sign * other >= sign * value
            and (other_cost < cost or sign * other > sign * value)
            for other_cost, other in points
        )
    ]


def plot_frontier(title: str, panels: Mapping[str, Curves], styles: Styles) -> Figure:
    """Accuracy (top) and nll (bottom) against the share of layers executed; a column a precision, a curve a method.

    Rings mark the points of a panel that no other beats; bars are standard errors.
    """
    averaged = all(p.accuracy for curves in panels.values() for points in curves.values() for p in points)
    measures = ["accuracy", "nll"] if averaged else ["nll"]
    figure = Figure(figsize=(max(3.3 * len(panels), 5.0), 3.0 * len(measures) + 1.1), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(measures), len(panels), sharex=True, sharey="row", squeeze=False)
    for column, (name, curves) in enumerate(panels.items()):
        for row, measure in enumerate(measures):
            axes = grid[row, column]
            every = []
            for label, points in curves.items():
                x, y = [p.ratio for p in points], [getattr(p, measure) for p in points]
                axes.errorbar(
                    x, [value for value, _ in y], [error for _, error in y],
                    label=label, capsize=2, elinewidth=0.8, markersize=5, **styles[label],
                )  # fmt: skip
                every += [(ratio, value) for ratio, (value, _) in zip(x, y, strict=True)]
            best = [every[i] for i in pareto(every, higher=measure == "accuracy")]
            axes.plot([x for x, _ in best], [y for _, y in best], label="Pareto", **RING)
            axes.grid(alpha=0.3)
        grid[0, column].set_title(name, fontsize=10)
        grid[-1, column].set_xlabel("share of layers executed")
    if averaged:
        grid[0, 0].set_ylabel("average accuracy, %")
    grid[-1, 0].set_ylabel("average nll, nats")
    handles = dict(zip(*reversed(grid[0, -1].get_legend_handles_labels()), strict=True)) | dict(
        zip(*reversed(grid[0, 0].get_legend_handles_labels()), strict=True)
    )
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), fontsize=9
    )
    return figure


def plot_histograms(
    title: str, histograms: Mapping[str, tuple[Sequence[float], Sequence[float]]], styles: Styles
) -> Figure:
    """Logit gaps of several runs side by side, on common axes; (edges, shares) by label."""
    columns = min(3, len(histograms))
    lines = math.ceil(len(histograms) / columns)
    figure = Figure(figsize=(max(3.3 * columns, 4.0), 2.5 * lines + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    cells = list(grid.flat)
    for position, (label, (edges, shares)) in enumerate(histograms.items()):
        axes = cells[position]
        axes.stairs(shares, edges, fill=True, alpha=0.8, color=styles[label]["color"])
        axes.axvline(0, color="black", linewidth=1, linestyle="--")
        axes.set_title(label, fontsize=9)
        axes.grid(alpha=0.3)
        if position + columns >= len(histograms):
            axes.set_xlabel("logit gap, execute − skip")
            axes.tick_params(labelbottom=True)
    for axes in cells[len(histograms) :]:
        axes.remove()
    for line in range(lines):
        grid[line, 0].set_ylabel("share of decisions")
    return figure


def plot_flips(title: str, curves: Mapping[str, tuple[np.ndarray, np.ndarray]], styles: Styles) -> Figure:
    """Share of decisions that noise flips, over training steps; values `(seeds, steps)`: their mean and range."""
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots()
    for label, (steps, values) in curves.items():
        style = styles[label]
        every = max(1, len(steps) // 12)
        axes.plot(steps, values.mean(0), label=label, markevery=every, markersize=5, **style)
        if len(values) > 1:
            axes.fill_between(
                steps, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0
            )
    axes.set_xlabel("step")
    axes.set_ylabel("decisions flipped by noise")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(3, len(curves)), fontsize=9)
    return figure


def plot_layers(
    title: str, panels: Mapping[str, Mapping[str, tuple[str, Sequence[float]]]], styles: Styles
) -> Figure:
    """Share of tokens that execute each layer; a panel a precision, a curve a method.

    Args:
        panels: By label, what its curve is called there, and the ratios `(layers,)`.
    """
    figure = Figure(figsize=(9.5, 2.2 * len(panels) + 1.0), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (name, curves) in zip(grid, panels.items(), strict=True):
        for label, (called, values) in curves.items():
            axes.plot(range(len(values)), values, label=called, markersize=4, linewidth=1.2, **styles[label])
        axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
        axes.set_ylim(-0.03, 1.03)
        axes.set_title(name, fontsize=10)
        axes.set_ylabel("tokens executing")
        axes.grid(alpha=0.3)
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[-1].set_xlabel("layer")
    return figure


@dataclass(frozen=True)
class Related:
    """What is varied, and how; measures of it by name (None: unknown); and value and standard error of what they are
    held against."""

    way: str
    setting: str
    measures: Mapping[str, float | None]
    value: tuple[float, float]


def plot_relations(title: str, against: str, panels: Mapping[str, Sequence[Related]]) -> Figure:
    """Points with error bars over each of their measures: a row a precision, a column a measure, a style a way.

    Points of a way are joined in their order. A panel says Spearman's rank correlation, with its p and the number of
    points, of which those that are the same count once.
    """
    every = [point for points in panels.values() for point in points]
    measures, ways = list(every[0].measures), list(dict.fromkeys(point.way for point in every))
    figure = Figure(figsize=(3.6 * len(measures), 3.0 * len(panels) + 1.0), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(panels), len(measures), sharex="col", sharey="row", squeeze=False)
    for row, (name, points) in zip(grid, panels.items(), strict=True):
        for axes, measure in zip(row, measures, strict=True):
            known = [(point, x) for point in points if (x := point.measures[measure]) is not None]
            for position, way in enumerate(ways):
                mine = [(x, *point.value) for point, x in known if point.way == way]
                if mine:
                    places, values, errors = zip(*mine, strict=True)
                    style = style_of(position) | {"linewidth": 0.8}
                    axes.errorbar(
                        places, values, errors, label=way, capsize=2, elinewidth=0.8, markersize=5, **style
                    )
            for point, x in known if axes is not row[-1] else ():
                where: dict[str, Any] = {"textcoords": "offset points", "fontsize": 6, "alpha": 0.8}
                above = ways.index(point.way) % 2 == 0
                axes.annotate(point.setting, (x, point.value[0]), xytext=(4, 4 if above else -8), **where)
            axes.set_title(
                f"{name}: {_rank_correlation([(x, point.value[0]) for point, x in known])}", fontsize=9
            )
            axes.grid(alpha=0.3)
        row[0].set_ylabel(against)
    for axes, measure in zip(grid[-1], measures, strict=True):
        axes.set_xlabel(measure)
    handles = dict(
        pair for axes in grid.flat for pair in zip(*reversed(axes.get_legend_handles_labels()), strict=True)
    )
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)), fontsize=9
    )
    return figure


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> str:
    """Spearman's, in words; no number where there are fewer than 3 points, or one of the two doesn't vary."""
    pairs = list(dict.fromkeys(pairs))
    if len(pairs) < 3 or any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
        return f"{len(pairs)} points"
    found = stats.spearmanr(*zip(*pairs, strict=True))
    return f"ρ = {found.statistic:.2f} (p = {found.pvalue:.2g}, {len(pairs)} points)"


@dataclass(frozen=True)
class Heat:
    """Values over λ₂ (rows) × θ (columns), shown to so many digits, with the execution ratio of each."""

    values: np.ndarray
    ratios: np.ndarray
    digits: int


def plot_heatmap(
    title: str, lambdas: Sequence[float], thetas: Sequence[float], panels: Mapping[str, Mapping[str, Heat]]
) -> Figure:
    """λ₂ × θ; a row of panels a measure, a column a precision; the execution ratio in brackets."""
    precisions = list(next(iter(panels.values())))
    figure = Figure(
        figsize=(
            max(0.85 * len(thetas) * len(precisions) + 2.2, 5.5),
            (0.55 * len(lambdas) + 1.2) * len(panels) + 0.4,
        ),
        layout="constrained",
    )
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(panels), len(precisions), squeeze=False)
    for row, (measure, by_precision) in enumerate(panels.items()):
        low = min(np.nanmin(heat.values) for heat in by_precision.values())
        high = max(np.nanmax(heat.values) for heat in by_precision.values())
        for column, precision in enumerate(precisions):
            axes, heat = grid[row, column], by_precision[precision]
            # cividis is even in lightness, and looks alike to all kinds of colour vision.
            image = axes.imshow(heat.values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
            for (i, j), value in np.ndenumerate(heat.values):
                text = "–" if math.isnan(value) else f"{value:.{heat.digits}f}\n({heat.ratios[i, j]:.2f})"
                axes.text(
                    j,
                    i,
                    text,
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color=_readable_on(image.cmap(image.norm(value))),
                )
            axes.set_xticks(range(len(thetas)), [f"{theta:g}" for theta in thetas])
            axes.set_yticks(range(len(lambdas)), [f"{value:g}" for value in lambdas])
            axes.set_xlabel("θ")
            axes.set_ylabel("λ₂")
            axes.set_title(f"{precision}, {measure}", fontsize=9)
        figure.colorbar(image, ax=list(grid[row]), shrink=0.9)
    return figure


def _readable_on(colour: tuple[float, ...]) -> str:
    """Black or white, whichever has the higher contrast; by WCAG's relative luminance."""
    rgb = np.array(colour[:3]) if colour[3] else np.ones(3)  # what is missing is transparent, on white
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    # At 0.179 both have a contrast of 4.6, which is enough for small text.
    return "black" if linear @ [0.2126, 0.7152, 0.0722] > 0.179 else "white"
