"""Draws what latency.py measured: speed-up over dense Hugging Face against the share of layers executed.

    python benchmarks/plot_latency.py benchmarks/results/latency.json latency.png

A panel for each model and run. Solid lines with markers are measured; the dashed line of the same colour is the ideal,
1 / share of the work left (see latency.py). The thin line at 1 is dense Hugging Face.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from qtale_lightning.files import replacing
from qtale_lightning.report.figures import DPI, STYLES

FORMS = {"bf16": STYLES[0], "fp32": STYLES[0], "int4": STYLES[1], "masked": STYLES[2]}
LABELS = {
    "bf16": "packed, bf16",
    "fp32": "packed, fp32",
    "int4": "packed, int4",
    "masked": "masked (as D-LLM prefills)",
}
COLUMNS = 4


def plot_latency(rows: list[dict[str, Any]], title: str = "") -> Figure:
    """The figure of latency.py's rows.

    Raises:
        ValueError: There are none of packed execution.
    """
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["form"] in FORMS:
            panels.setdefault((row["model"], row["run"]), []).append(row)
    if not panels:
        raise ValueError(f"no rows of {', '.join(FORMS)} to plot: benchmarks/latency.py --json makes them")
    models = list(dict.fromkeys(model for model, _ in panels))
    widest = max(sum(model == one for one, _ in panels) for model in models)
    columns = min(COLUMNS, widest)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.2 * columns, 3.0 * lines + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=10)
    cells = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, ((model, run), shown) in zip(cells, panels.items(), strict=False):
        draw(axes, shown)
        axes.set_title(f"{model}\n{run}", fontsize=9)
    for axes in cells[len(panels) - columns : len(panels)]:  # the lowest panel of each column
        axes.set_xlabel("share of layers executed")
    for axes in cells[len(panels) :]:
        axes.remove()
    figure.supylabel("speed-up over dense Hugging Face", fontsize=10)
    known = {
        label: line for axes in cells for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(known.values(), known, loc="outside lower center", ncols=min(5, len(known)), fontsize=8)
    return figure


def draw(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """One panel: a line for each form that has several ratios, a point for one that has one."""
    for form, style in FORMS.items():
        points = sorted((row["ratio"], row["speed-up"], row["ideal"]) for row in rows if row["form"] == form)
        if not points:
            continue
        ratios, speedups, ideals = zip(*points, strict=True)
        marker = {"color": style["color"], "marker": style["marker"], "markersize": 5}
        axes.plot(
            ratios, speedups, label=LABELS[form], linestyle="-" if len(points) > 1 else "none", **marker
        )
        if form != "masked":
            axes.plot(
                ratios, ideals, color=style["color"], linestyle="--", linewidth=1, label=f"ideal, {form}"
            )
    axes.axhline(1, color="#777777", linewidth=0.8, zorder=0)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_locator(LogLocator(base=2))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.5), max(high, 2))  # at least two ticks
    axes.set_xticks(sorted({row["ratio"] for row in rows}))
    axes.grid(alpha=0.3)


def main() -> None:
    """Read, draw, write."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("measured", type=Path, help="JSON of latency.py")
    options.add_argument("target", type=Path, help="PNG to write")
    args = options.parse_args()
    measured = json.loads(args.measured.read_text(encoding="utf-8"))
    figure = plot_latency(measured["rows"], measured["hardware"])
    with replacing(args.target) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


if __name__ == "__main__":
    main()
