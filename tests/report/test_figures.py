"""The figures: the points they draw against the rows they were given."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from qtale_lightning.report import write_figures
from qtale_lightning.report.figures import PANELS, STYLES, plot_accuracy, plot_layers, plot_losses
from qtale_lightning.results import Results, save_results
from qtale_lightning.results.series import validation_series


def drawn(figure: Figure, panel: int) -> list[np.ndarray]:
    """The points of each error-bar line of a panel, shape `(points, 2)`."""
    containers = [c for c in figure.axes[panel].containers if isinstance(c, ErrorbarContainer)]
    return [container.lines[0].get_xydata() for container in containers]  # type: ignore[misc]


def test_accuracy_draws_a_line_per_precision(qtale: Results) -> None:
    figure = plot_accuracy(qtale)
    for panel, key, unit in ((0, "average", 100), (1, "average_nll", 1)):
        lines = drawn(figure, panel)
        assert len(lines) == 3
        for line, rows in zip(lines, validation_series(qtale).values(), strict=True):
            wanted = [[row["execution_ratio"], unit * row[key]] for row in rows]  # type: ignore[literal-required]
            np.testing.assert_allclose(line, wanted)
    assert "9,698 validation questions" in figure.get_suptitle()
    assert "smollm2-135m · qtale · csqa · seed 0" in figure.get_suptitle()


def test_error_bars_are_one_standard_error(qtale: Results) -> None:
    container = plot_accuracy(qtale).axes[0].containers[0]
    segment = container.lines[2][0].get_segments()[0]  # type: ignore[attr-defined]
    row = validation_series(qtale)["16-bit"][0]
    np.testing.assert_allclose(segment[1, 1] - segment[0, 1], 200 * row["average_stderr"])


def test_selected_points_are_ringed_and_thetas_are_sparse(qtale: Results) -> None:
    top = plot_accuracy(qtale).axes[0]
    rings = [line.get_xydata()[0] for line in top.lines if line.get_markersize() == 13]  # type: ignore[index]
    chosen = [(row["execution_ratio"], 100 * row["average"]) for row in qtale["selected"]]
    np.testing.assert_allclose(rings, chosen)
    assert [text.get_text() for text in top.texts] == [
        *("0.9", "0.5", "0"),
        *("0.9", "0.5", "0.4", "0"),
        *("0.9", "0.5", "0.2", "0"),
    ]


def test_a_full_run_shows_its_precisions_side_by_side(full: Results) -> None:
    figure = plot_accuracy(full)
    lines = drawn(figure, 0)
    np.testing.assert_allclose(np.concatenate(lines), [[0, 58.5], [1, 57.1], [2, 52.8]])
    figure.draw_without_rendering()
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["16-bit", "4-bit", "3-bit"]
    assert not figure.axes[0].texts


def test_layers_draws_training_and_each_selected_precision(qtale: Results) -> None:
    axes = plot_layers(qtale).axes[0]
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["training", "16-bit, θ = 0.5", "4-bit, θ = 0.4", "3-bit, θ = 0.2"]
    row = next(row for row in qtale["evaluation"] if (row["bits"], row["theta"]) == (3, 0.2))
    np.testing.assert_allclose(axes.lines[3].get_ydata(), row["execution_ratio_per_layer"])
    colors = [line.get_color() for line in axes.lines[1:]]
    assert colors == [container.lines[0].get_color() for container in plot_accuracy(qtale).axes[0].containers]  # type: ignore[attr-defined]


def test_styles_differ_in_more_than_colour() -> None:
    for aspect in ("color", "marker", "linestyle"):
        assert len({style[aspect] for style in STYLES}) == len(STYLES)


def test_losses_has_a_panel_per_logged_group(metrics_csv: Path) -> None:
    figure = plot_losses(metrics_csv, "a title")
    assert [axes.get_ylabel() for axes in figure.axes] == [
        name for name in PANELS if name != "decisions not foreseen"
    ]
    (line,) = [line for line in figure.axes[1].lines if line.get_label() == "val/ce"]
    metrics = pd.read_csv(metrics_csv)[["step", "val/ce"]].dropna()
    np.testing.assert_allclose(line.get_xydata(), metrics.to_numpy())
    # Beside the validation curve: the 300 logged values, faint, and their rolling mean.
    faint, mean = [line for line in figure.axes[1].lines if line.get_label() != "val/ce"]
    logged = pd.read_csv(metrics_csv)["train/ce"].dropna().to_numpy()
    np.testing.assert_allclose(faint.get_ydata(), logged)
    np.testing.assert_allclose(np.asarray(mean.get_ydata())[150], logged[143:158].mean())


def test_losses_of_a_full_run_leaves_routing_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    pd.DataFrame({"step": [0, 1, 2], "train/loss": [3.0, 2.0, 1.0], "train/flip_ratio": np.nan}).to_csv(path)
    figure = plot_losses(path)
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [3, 2, 1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,lr\n0,1.0\n", "needs values of some of train/loss"),
        (
            "epoch,train/loss\n0,1.0\n",
            "has no column 'step': `python -m qtale_lightning report .*` makes it anew",
        ),
        ("step,train/loss\n0,1.0,2.0\n1\n2,3.0,4.0,5.0\n", "is no table"),
        ("step,train/loss\n0,1.0\n1,2.x\n", "has other values than numbers in train/loss"),
    ],
)
def test_metrics_that_cant_be_drawn_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"metrics\.csv:? {message}"):
        plot_losses(path)


def test_nothing_to_plot_is_an_error(full: Results) -> None:
    with pytest.raises(ValueError, match="no execution ratios per layer"):
        plot_layers(full)
    full["evaluation"] = []
    with pytest.raises(ValueError, match="no validation rows"):
        plot_accuracy(full)


@pytest.mark.slow
def test_figures_are_written_as_png_and_pdf(tmp_path: Path, qtale: Results, metrics_csv: Path) -> None:
    assert metrics_csv.parent == tmp_path
    save_results(tmp_path, qtale)
    written = write_figures(tmp_path)
    assert [path.name for path in written] == [
        *("accuracy.png", "accuracy.pdf", "layers.png", "layers.pdf", "losses.png", "losses.pdf")
    ]
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF"}
    assert all(path.read_bytes().startswith(starts[path.suffix]) for path in written)
    assert sorted((tmp_path / "plots").iterdir()) == sorted(written)
    assert not pyplot.get_fignums()


def test_figures_without_data_are_left_out(tmp_path: Path, full: Results) -> None:
    save_results(tmp_path, full)
    assert [path.name for path in write_figures(tmp_path)] == ["accuracy.png", "accuracy.pdf"]
    full["evaluation"] = []
    save_results(tmp_path, full)
    (tmp_path / "metrics.csv").write_text("step,lr\n0,0.001\n")
    assert write_figures(tmp_path) == []


def test_a_failing_write_leaves_the_old_figure(
    tmp_path: Path, full: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_results(tmp_path, full)
    before = write_figures(tmp_path)[0].read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    with pytest.raises(OSError, match="read-only"):
        write_figures(tmp_path)
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["accuracy.pdf", "accuracy.png"]
    assert (tmp_path / "plots" / "accuracy.png").read_bytes() == before
