"""A table's figures, from its finished runs: their `results.json` and `metrics.csv`; PNG, PDF and a caption each."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from qtale_lightning.files import replacing
from qtale_lightning.report.figures import SMOOTHED_FROM
from qtale_lightning.report.notes import theta_text
from qtale_lightning.report.routing_figure import read_metrics
from qtale_lightning.report.style import DPI
from qtale_lightning.results.store import same_theta
from qtale_lightning.routing import method_of
from qtale_lightning.tables.diversity import related
from qtale_lightning.tables.plots import (
    Heat,
    Point,
    Styles,
    plot_flips,
    plot_frontier,
    plot_heatmap,
    plot_histograms,
    plot_layers,
    plot_relations,
    style_of,
)
from qtale_lightning.tables.table import Table, commit_of
from qtale_lightning.tables.variants import Variant, find_variants, point_of, precisions

LAMBDA = "model.lambda_entropy"


def write_figures(table: Table, folder: Path, command: str) -> list[Path]:
    """Draws what the finished runs have data for, for each data set; returns the files.

    Raises:
        FileNotFoundError, ValueError: as `load_results`.
    """
    written = []
    data_sets = list(dict.fromkeys(data for line in table.lines for data in table.data_of(line)))
    for data in data_sets:
        variants = find_variants(table, data)
        if not variants:
            continue
        title = f"{table.request.model} · {variants[0].runs[0].data}"
        for name, (draw, says) in DRAWN.items():
            figure = draw(table, variants, title)
            if figure is None:
                continue
            stem = name if len(data_sets) == 1 else f"{name}-{variants[0].runs[0].data}"
            for kind in ("png", "pdf"):
                with replacing(folder / f"{stem}.{kind}") as temporary:
                    # Without the date, which a PDF has otherwise: the same runs make the same file.
                    metadata = {"CreationDate": None} if kind == "pdf" else {}
                    figure.savefig(temporary, format=kind, dpi=DPI, metadata=metadata)
                written.append(folder / f"{stem}.{kind}")
            with replacing(folder / f"{stem}.md") as temporary:
                temporary.write_text(_caption(says, stem, table, variants, command), encoding="utf-8")
            written.append(folder / f"{stem}.md")
    return written


def _styles(variants: Sequence[Variant]) -> Styles:
    curves = list(dict.fromkeys(variant.curve for variant in variants))
    return {
        name: style_of(curves.index(variant.curve))
        for variant in variants
        for name in (variant.curve, variant.label)
    }


def _frontier(table: Table, variants: list[Variant], title: str) -> Figure | None:
    panels = {}
    for name, (bits, engine) in precisions(table).items():
        curves: dict[str, list[Point]] = {}
        for variant in variants:
            points = [point_of(group) for group in variant.rows(bits, engine)]
            curves[variant.curve] = sorted(curves.get(variant.curve, []) + points, key=lambda p: p.ratio)
        panels[name] = {label: points for label, points in curves.items() if points}
    panels = {name: curves for name, curves in panels.items() if curves}
    return plot_frontier(title, panels, _styles(variants)) if panels else None


def _histograms(table: Table, variants: list[Variant], title: str) -> Figure | None:
    found = {}
    for variant in variants:
        counted = [
            results["routing"]["histograms"]["logit_gap"]
            for results in variant.results
            if "logit_gap" in results.get("routing", {}).get("histograms", {})
        ]
        if counted:
            counts = np.sum([np.asarray(one["counts"], float) for one in counted], axis=0)
            found[variant.label] = (counted[0]["edges"], (counts / max(1.0, counts.sum())).tolist())
    return (
        plot_histograms(f"{title} · how firmly routers decide", found, _styles(variants)) if found else None
    )


def _flips(table: Table, variants: list[Variant], title: str) -> Figure | None:
    curves = {}
    for variant in variants:
        logged = []
        for run in variant.runs:
            metrics = read_metrics(run.directory.root / "metrics.csv")
            if "train/flip_ratio" in metrics:
                logged.append(metrics.set_index("step")["train/flip_ratio"].dropna())
        if not logged or not len(logged[0]):
            continue
        steps = sorted(set.intersection(*(set(one.index) for one in logged)))
        values = np.array([one[~one.index.duplicated()].loc[steps].to_numpy() for one in logged])
        curves[variant.label] = (np.array(steps), _smooth(values))
    return (
        plot_flips(f"{title} · decisions that Gumbel noise flips", curves, _styles(variants))
        if curves
        else None
    )


def _smooth(values: np.ndarray) -> np.ndarray:
    """Long logs as their rolling mean over a twentieth of them; `(seeds, steps)`."""
    window = values.shape[1] // 20 if values.shape[1] >= SMOOTHED_FROM else 1
    return pd.DataFrame(values.T).rolling(window, center=True, min_periods=1).mean().to_numpy().T


def _short(theta: float | list[float] | None) -> str:
    return f"{theta:.3g}" if isinstance(theta, float) else theta_text(theta)


def _layers(table: Table, variants: list[Variant], title: str) -> Figure | None:
    panels: dict[str, dict[str, tuple[str, Sequence[float]]]] = {}
    for name, (bits, engine) in precisions(table).items():
        for variant in variants:
            for line in table.lines:
                same = (line.kind, line.bits, line.engine) == (variant.line.kind, bits, engine)
                if not same or variant.curve in panels.get(name, {}):
                    continue
                rows = [
                    row for run in variant.runs if (row := table.answer(line, variant.data, run.seed).row)
                ]
                if not rows:
                    continue
                mean = np.mean([row["execution_ratio_per_layer"] for row in rows], axis=0)
                called = variant.label
                if method_of(line.method).theta:
                    called += f", θ = {'; '.join(dict.fromkeys(_short(row['theta']) for row in rows))}"
                elif mean.min() == 1:  # a method that skips nothing
                    continue
                panels.setdefault(name, {})[variant.curve] = (called, mean.tolist())
                break
    return plot_layers(f"{title} · which layers execute", panels, _styles(variants)) if panels else None


def _heatmap(table: Table, variants: list[Variant], title: str) -> Figure | None:
    """Of the variants that differ in λ₂ alone; D-LLM is λ₂ = 0."""
    of_lambda = [variant for variant in variants if "lambda_ratio" in method_of(variant.line.method).weights]
    by_lambda = {_lambda(v): v for v in of_lambda if {key for key, _ in v.line.options} <= {LAMBDA}}
    lambdas = sorted(by_lambda)
    asked = {theta for v in by_lambda.values() for theta in v.runs[0].sweep.grid()}
    asked |= {line.theta for line in table.lines if isinstance(line.theta, float)}
    panels: dict[str, dict[str, Heat]] = {}
    thetas = sorted(asked, reverse=True)
    if len(lambdas) < 2 or not thetas:
        return None
    for name, (bits, engine) in precisions(table).items():
        groups = {value: by_lambda[value].rows(bits, engine) for value in lambdas}

        def at(value: float, theta: float, groups: dict[float, Any] = groups) -> Point | None:
            found = (g for g in groups[value] if same_theta(g[0]["theta"], theta))
            group = next(found, None)
            return point_of(group) if group else None

        points = [[at(value, theta) for theta in thetas] for value in lambdas]
        if not any(point for row in points for point in row):
            continue
        ratios = np.array([[p.ratio if p else math.nan for p in row] for row in points])
        accuracy = np.array(
            [[p.accuracy[0] if p and p.accuracy else math.nan for p in row] for row in points]
        )
        nll = np.array([[p.nll[0] if p else math.nan for p in row] for row in points])
        if not np.isnan(accuracy).all():
            panels.setdefault("accuracy, %", {})[name] = Heat(accuracy, ratios, 1)
        panels.setdefault("nll, nats", {})[name] = Heat(nll, ratios, 3)
    return plot_heatmap(f"{title} · λ₂ × θ", lambdas, thetas, panels) if panels else None


def _diversity(table: Table, variants: list[Variant], title: str) -> Figure | None:
    if "added_nll" not in table.declaration.columns:
        return None
    panels = {
        name: points
        for name, (bits, _) in precisions(table).items()
        if (points := related(table, variants[0].data, bits))
    }
    what = f"{title} · what quantization adds, at equal execution ratio"
    return plot_relations(what, "added nll, nats", panels) if panels else None


def _lambda(variant: Variant) -> float:
    return float(variant.runs[0].directory.read_config()["model"]["lambda_entropy"])


Draw = Callable[[Table, list[Variant], str], Figure | None]
DRAWN: dict[str, tuple[Draw, str]] = {
    "frontier": (
        _frontier,
        "Average accuracy and nll of the gold answers on the validation questions against the measured share of layers "
        "executed, at every θ that was evaluated; a curve for each method, a column for each precision. Rings mark the "
        "points of a panel that no other beats (Pareto).",
    ),
    "logit-gap": (
        _histograms,
        "Router logits, execute − skip, over tokens and layers of held-out training rows at the last validation; the "
        "outer bins hold all that lies beyond. A gap near 0 is one that Gumbel noise can turn.",
    ),
    "flips": (
        _flips,
        "Share of the decisions of a training batch that Gumbel noise flips, against what the logits alone decide; "
        f"from {SMOOTHED_FROM} logged values on, the rolling mean over a twentieth of them. Bands: range over seeds.",
    ),
    "layers": (
        _layers,
        "Share of the validation questions' tokens that execute each layer, at the θ of the table's first line of each "
        "method. Layers without a router execute always.",
    ),
    "heatmap": (
        _heatmap,
        "Accuracy and nll over the entropy loss's weight λ₂ (0: D-LLM) and θ, with the measured share of layers "
        "executed in brackets: values in one picture cost differently much.",
    ),
    "diversity": (
        _diversity,
        "The nll that quantization adds, paired by question, at equal execution ratio, against the share of layers in "
        "which two tokens' paths differ on average: of the 16-bit model on the validation questions, and at the end of "
        "training, noise included. On the right against the nll of the 16-bit model, which it may depend on instead. "
        "ρ is Spearman's, over all points of a panel, which share runs and questions, "
        "so that its p is too small rather than too large.",
    ),
}  # fmt: skip


def _caption(says: str, stem: str, table: Table, variants: Sequence[Variant], command: str) -> str:
    lines = [f"![{stem}]({stem}.png)", "", says, ""]
    several = max(len(variant.runs) for variant in variants) > 1
    spread = (
        "means over seeds, bars: their standard error" if several else "bars: standard error over questions"
    )
    rows = [
        row for v in variants for r in v.results for row in r["evaluation"] if row["split"] == "validation"
    ]
    counts = sorted({row["examples"] for row in rows})
    lines += [
        f"{table.request.model}; {', '.join(f'{count:,}' for count in counts)} validation questions; {spread}.",
        "",
    ]
    for variant in variants:
        steps = ", ".join(dict.fromkeys(f"{run.steps:,} steps" for run in variant.runs))
        seeds = ", ".join(str(run.seed) for run in variant.runs)
        roots = ", ".join(f"`{run.directory.root.relative_to(table.request.out)}`" for run in variant.runs)
        lines.append(f"- {variant.label}: {steps}, seed{'s' * (len(variant.runs) > 1)} {seeds} ({roots})")
    commits = sorted({commit_of(results) for variant in variants for results in variant.results})
    lines += ["", f"Commit: {', '.join(commits)}.", "", f"```\n{command}\n```"]
    return "\n".join(lines) + "\n"
