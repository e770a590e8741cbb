"""The routers' figure: the points it draws against the numbers it was given, and what is left out."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from qtale_lightning.report import write_figures
from qtale_lightning.report.routing_figure import plot_routing
from qtale_lightning.results import Results, save_results

LAYERS = 30


def make_changes(bits: int, theta: float) -> dict[str, Any]:
    """A row of `changes`: the fewer bits and the higher θ, the more decisions change."""
    changed = [None, None, *np.linspace(0, (16 - bits) / 100 * theta, LAYERS - 2)]
    return {
        "bits": bits, "engine": "native", "theta": theta, "examples": 200, "tokens": 4921, "execution_ratio": 0.7,
        "decisions_changed": 0.03, "paths_changed": 0.5, "changed_per_layer": changed, "flip_ratio": 0.2,
        "paths": {"tokens": 4921, "distinct": 2770, "entropy": 7.4, "entropy_share": 0.87},
        "nll": 3.9, "nll_same_decisions": 3.9, "nll_difference_stderr": 0.01,
    }  # fmt: skip


@pytest.fixture
def inspected(qtale: Results) -> Results:
    """A routed run that recorded everything, inspected at two θ."""
    gaps = np.linspace(-8, 8, 65).tolist()
    qtale["routing"] |= {  # type: ignore[typeddict-item]
        "flip_ratio_per_layer": [None, None, *np.linspace(0.1, 0.3, LAYERS - 2)],
        "histograms": {
            "logit_gap": {"edges": gaps, "counts": [*range(32), *range(32, 0, -1)]},
            "probability": {"edges": [0.0, 0.5, 1.0], "counts": [25, 75]},
        },
        "paths": {"tokens": 900, "distinct": 300, "entropy": 5.0, "entropy_share": 0.7},
        "noisy_paths": {"tokens": 900, "distinct": 890, "entropy": 6.7, "entropy_share": 0.99},
    }
    qtale["changes"] = [make_changes(bits, theta) for theta in (0.5, 0.3) for bits in (16, 4, 3)]  # type: ignore[misc]
    return qtale


@pytest.fixture
def metrics() -> pd.DataFrame:
    """Two validations between training rows, whose cells are empty."""
    columns = {"step": [0, 99, 100, 199]}
    for factor, kind in enumerate(("paths", "noisy_paths"), start=1):
        for name in ("distinct", "entropy", "distinct_of_500", "entropy_of_500"):
            columns[f"val/{kind}/{name}"] = [np.nan, factor * 1.0, np.nan, factor * 2.0]
    return pd.DataFrame(columns)


def lines(figure: Figure, panel: int) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.asarray(line.get_xydata()) for line in figure.axes[panel].lines}


def test_every_panel_draws_its_numbers(inspected: Results, metrics: pd.DataFrame) -> None:
    figure = plot_routing(inspected, metrics)
    assert figure is not None
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == [
        *(
            "share of decisions",
            "share of decisions",
            "decisions flipped by noise",
            "decisions unlike 16 bits",
        ),
        *("distinct paths\nof 500 tokens", "entropy of paths, nats\nof 500 tokens"),
    ]
    (bars,) = figure.axes[1].patches
    np.testing.assert_allclose(bars.get_data().values, [0.25, 0.75])  # type: ignore[attr-defined]
    flips = lines(figure, 2)["last training batches"]
    assert np.isnan(flips[:2, 1]).all()
    np.testing.assert_allclose(flips[2:, 1], np.linspace(0.1, 0.3, LAYERS - 2))
    changed = lines(figure, 3)
    assert list(changed) == ["4 bits, θ = 0.5", "3 bits, θ = 0.5"]  # of the higher θ, and 16 bits has none
    assert changed["3 bits, θ = 0.5"][-1, 1] == pytest.approx(0.065)
    diversity = lines(figure, 5)
    np.testing.assert_allclose(diversity["as inference decides"], [[99, 1], [199, 2]])
    np.testing.assert_allclose(diversity["as Gumbel noise decides"], [[99, 2], [199, 4]])


def test_few_tokens_are_shown_as_they_are(qtale: Results, metrics: pd.DataFrame) -> None:
    figure = plot_routing(qtale, metrics.drop(columns=[c for c in metrics if c.endswith("_of_500")]))
    assert figure is not None
    assert [axes.get_ylabel() for axes in figure.axes] == ["distinct paths", "entropy of paths, nats"]


def test_runs_without_such_numbers_have_no_such_figure(qtale: Results, full: Results) -> None:
    """Those without routers, and those of before the numbers were recorded."""
    assert plot_routing(full, pd.DataFrame()) is None
    assert plot_routing(qtale, pd.DataFrame({"step": [1], "train/loss": [2.0]})) is None


@pytest.mark.slow
def test_the_figure_is_one_of_a_runs_plots(inspected: Results, metrics: pd.DataFrame, tmp_path: Path) -> None:
    save_results(tmp_path, inspected)
    metrics.to_csv(tmp_path / "metrics.csv", index=False)
    assert {"routing.png", "routing.pdf"} <= {path.name for path in write_figures(tmp_path)}
