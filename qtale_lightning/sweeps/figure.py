"""Parallel coordinates of a sweep: an axis for each parameter and each thing measured, a line for each run."""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

STEPS = 12
"""The most different values that an axis gives a place each; above, it is a scale."""

# Even in grey, told apart by colour-blind readers, and without the yellow that paper swallows.
COLORS = ListedColormap(mpl.colormaps["viridis"](np.linspace(0, 0.88, 256)))


@dataclass
class Scale:
    """Places in [0, 1] of an axis's values, and where its ticks stand."""

    title: str
    places: np.ndarray
    ticks: list[tuple[float, str]]


def plot_parallel(frame: pd.DataFrame, parameters: Sequence[str]) -> Figure:
    """A line for each row of `sweep_frame`, coloured by nll: the lower, the darker.

    Axes on which all runs agree are left out.
    """
    nll = frame["measured.average_nll"].to_numpy(float)
    scales = _scales(frame, parameters)
    figure = Figure(figsize=(1.6 + 1.7 * len(scales), 4.4), layout="constrained")
    axes = figure.subplots()
    colors = ScalarMappable(Normalize(nll.min(), nll.max()), COLORS)
    columns = np.arange(len(scales))
    for row in np.argsort(-nll):  # the best last, above the others
        heights = [scale.places[row] for scale in scales]
        axes.plot(columns, heights, color=colors.to_rgba(nll[row]), linewidth=1.4, alpha=0.85)
    for column, scale in enumerate(scales):
        _draw(axes, column, scale)
    axes.set_xlim(-0.3, len(scales) - 0.55)
    axes.set_xticks(columns, [scale.title for scale in scales])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=8)
    figure.colorbar(colors, ax=axes, label="average nll, nats", pad=0.02)
    return figure


def _scales(frame: pd.DataFrame, parameters: Sequence[str]) -> list[Scale]:
    named = {name.rpartition(".")[2] for name in parameters}
    found = [_scale(name.rpartition(".")[2], frame[name]) for name in parameters]
    if "bits" not in named:
        found.append(_scale("bits", frame["measured.bits"]))
    if "theta" not in named:
        found.append(
            _scale("θ", frame["measured.theta"].map(lambda theta: theta if np.isscalar(theta) else None))
        )
    found.append(_scale("layers executed", frame["measured.execution_ratio"], steps=0))
    found.append(_scale("average %", 100 * frame["measured.average"].astype(float), steps=0))
    found.append(_scale("nll", frame["measured.average_nll"], steps=0))
    return [scale for scale in found if scale is not None]


def _scale(title: str, values: pd.Series, steps: int = STEPS) -> Scale | None:
    """None where there is nothing to tell runs apart by."""
    if values.isna().any() or values.nunique() < 2:
        return None
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.isna().any() or values.nunique() <= steps:
        order = sorted(values.unique(), key=_order)
        places = values.map({value: i / (len(order) - 1) for i, value in enumerate(order)})
        ticks = [(i / (len(order) - 1), _text(value)) for i, value in enumerate(order)]
        return Scale(title, places.to_numpy(float), ticks)
    plain = numbers.to_numpy(float)
    log = plain.min() > 0 and plain.max() / plain.min() >= 50
    bent = np.log(plain) if log else plain
    low, high = bent.min(), bent.max()
    marks = np.linspace(low, high, 5)
    ticks = [((mark - low) / (high - low), f"{np.exp(mark) if log else mark:.3g}") for mark in marks]
    return Scale(title + (" (log)" if log else ""), (bent - low) / (high - low), ticks)


def _order(value: object) -> tuple[int, float, str]:
    number = pd.to_numeric(str(value).strip("[]"), errors="coerce")
    return (1, 0.0, str(value)) if np.isnan(number) else (0, float(number), "")


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float | np.floating) else str(value).strip("[]")


def _draw(axes: Axes, column: int, scale: Scale) -> None:
    axes.axvline(column, color="0.35", linewidth=0.9, zorder=0)
    for place, text in scale.ticks:
        label = axes.text(column + 0.04, place, text, fontsize=8, va="center", zorder=3)
        label.set_bbox(
            {"facecolor": mpl.rcParams["axes.facecolor"], "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
        )
