"""What figures are drawn from: Pareto points, and styles that differ in more than their colour."""

import matplotlib.colors
import numpy as np
import pytest

from qtale_lightning.report.style import STYLES
from qtale_lightning.tables.plots import Heat, Point, pareto, plot_frontier, plot_heatmap, style_of


@pytest.mark.parametrize(
    ("points", "higher", "best"),
    [
        ([(0.5, 40), (0.7, 45), (0.9, 44), (1.0, 50)], True, [0, 1, 3]),
        ([(0.5, 4.0), (0.7, 3.5), (0.9, 3.6), (1.0, 3.0)], False, [0, 1, 3]),
        ([(0.5, 40), (0.5, 42)], True, [1]),
        ([(0.5, 40), (0.5, 40)], True, [0, 1]),
        ([], True, []),
    ],
)
def test_a_pareto_point_is_beaten_by_none(
    points: list[tuple[float, float]], higher: bool, best: list[int]
) -> None:
    assert pareto(points, higher) == best


def test_styles_differ_without_colour() -> None:
    styles = [style_of(i) for i in range(2 * len(STYLES))]
    looks = [(s["marker"], str(s["linestyle"]), s.get("markerfacecolor", "filled")) for s in styles]
    assert len(set(looks)) == len(looks)


def test_the_frontier_has_a_column_a_precision_and_rings_for_its_pareto_points() -> None:
    points = [Point(0.5, (40.0, 1.0), (4.0, 0.1)), Point(1.0, (38.0, 1.0), (4.2, 0.1))]
    panels = {"16 bits": {"QTALE": points}, "3 bits": {"QTALE": points[:1]}}
    figure = plot_frontier("title", panels, {"QTALE": style_of(0)})
    assert len(figure.axes) == 4
    assert [axes.get_title() for axes in figure.axes[:2]] == ["16 bits", "3 bits"]
    rings = [line for line in figure.axes[0].lines if line.get_label() == "Pareto"]
    assert list(rings[0].get_xdata()) == [0.5], "more layers for less accuracy is beaten"


def test_without_an_average_nll_stands_alone() -> None:
    figure = plot_frontier("t", {"16 bits": {"a": [Point(0.5, None, (4.0, 0.1))]}}, {"a": style_of(0)})
    assert [axes.get_ylabel() for axes in figure.axes] == ["average nll, nats"]


def test_text_of_a_heat_map_can_be_read_on_its_colour() -> None:
    values = np.array([[1.0, 2.0], [3.0, np.nan]])
    heat = Heat(values, np.full((2, 2), 0.75), 2)
    figure = plot_heatmap("t", [0.2, 1.0], [0.5, 0.1], {"nll, nats": {"3 bits": heat}})
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.00\n(0.75)", "2.00\n(0.75)", "3.00\n(0.75)", "–"]
    image = axes.images[0]

    def luminance(colour: object) -> float:
        """Relative, by WCAG's weights of linear RGB."""
        rgb = np.array(matplotlib.colors.to_rgb(colour))  # type: ignore[arg-type]
        return float(
            np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
        )

    for value, text in zip((1.0, 2.0, 3.0), axes.texts, strict=False):
        behind, front = luminance(image.cmap(image.norm(value))[:3]), luminance(text.get_color())
        contrast = (max(behind, front) + 0.05) / (min(behind, front) + 0.05)
        assert contrast >= 4.5, f"WCAG's AA for small text, {value}"
