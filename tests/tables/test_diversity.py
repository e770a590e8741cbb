"""A table that varies the diversity of paths: what is run for it, what quantization adds, and how the two are drawn."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from qtale_lightning.results.series import other_rows, own_rows
from qtale_lightning.results.store import load_results
from qtale_lightning.tables.diversity import MEASURES
from qtale_lightning.tables.figures import DRAWN
from qtale_lightning.tables.plots import Related, plot_relations
from tests.tables.conftest import QUESTIONS
from tests.tables.files import figures, rows, table

DECLARED = """
title: t
columns: [theta, execution_ratio, path_distance, nll, added_nll]
cells:
  - {name: noise, method: qtale, perturb: {noise: [0, 1]}, theta: {rule: budget, budget: 0.7}, bits: [16, 3]}
  - {name: grid, method: qtale, perturb: {noise: 2}, theta: 0.5, bits: [16, 3]}
  - {name: static, method: static, bits: [16, 3], group: one path}
"""
Arguments = Callable[..., list[str]]


@pytest.fixture
def given(arguments: Arguments, declared: Callable[[str], Path], commands: Any) -> list[str]:
    """The command line of a table that was made."""
    found = arguments(str(declared(DECLARED)))
    table(found, commands)
    return found


@pytest.mark.slow
def test_perturbed_rows_are_asked_for_and_stand_for_nothing_else(
    given: list[str], commands: Any, tmp_path: Path
) -> None:
    perturbing = [line for line in commands.started if "--noise" in line]
    assert [line[0] for line in perturbing] == ["thresholds", "evaluate", "evaluate"]
    assert perturbing[0][-6:] == ["--sweep.rule", "budget", "--sweep.budgets", "[0.7]", "--noise", "1.0"]
    assert perturbing[2][-6:] == ["--bits", "3", "--theta", "0.5", "--noise", "2.0"]
    results = load_results(tmp_path / "out" / "tiny-qtale-facts-s0")
    assert len(other_rows(results)) == 4
    assert not any("perturbation" in row["protocol"] for row in own_rows(results))
    started = len(commands.started)
    table(given, commands)
    assert len(commands.started) == started, "all of it is known again"

    check_what_quantization_adds(given)


def check_what_quantization_adds(given: list[str]) -> None:
    """Paired with the same line at 16 bits."""
    found = {(row["name"], row["setting"], row["bits"]): row["values"] for row in rows(given, "mine")}
    # Of six layers, four execute 0.7, 0.7, 0.5 of the tokens; what the dropped layers of static do isn't made up here.
    expected = [4 / 6 * 2 * ratio * (1 - ratio) for ratio in (0.7, 0.7, 0.5)]
    distances = [found[at]["path_distance"]["value"] for at in found if at[2] == 3]
    assert distances[:3] == pytest.approx(expected)
    for (name, setting, bits), values in found.items():
        added = values["added_nll"]
        if bits == 16:
            assert added["value"] is None
            continue
        # At 3 bits about a twentieth of the questions fewer is right: their nll is 3 instead of 2.
        share = values["nll"]["value"] - found[name, setting, 16]["nll"]["value"]
        assert 0.04 < share < 0.06
        assert added["value"] == pytest.approx(share)
        assert added["over"] == "questions"
        # Those questions alone differ: the error of a share of them, which is far below that of the two averages.
        assert added["stderr"] == pytest.approx((share * (1 - share) / QUESTIONS) ** 0.5, rel=0.1)


@pytest.mark.slow
def test_the_figure_holds_the_added_nll_against_diversity_and_nll(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Sequence[Related]] = {}

    def draw(title: str, against: str, panels: dict[str, Sequence[Related]]) -> Figure:
        seen.update(panels)
        return plot_relations(title, against, panels)

    monkeypatch.setattr("qtale_lightning.tables.figures.plot_relations", draw)
    monkeypatch.setattr("qtale_lightning.tables.figures.DRAWN", {"diversity": DRAWN["diversity"]})
    figures(given)
    assert (tmp_path / "out/tables/mine-tiny-facts/figures/diversity.pdf").is_file()
    assert list(seen) == ["3 bits"]
    points = seen["3 bits"]
    assert [(point.way, point.setting) for point in points] == [
        ("noise", ""), ("noise", "noise 1"), ("grid", "noise 2"), ("one path", ""),
    ]  # fmt: skip
    inference, training, nll = MEASURES
    assert [point.measures[inference] for point in points[:3]] == pytest.approx([0.28, 0.28, 1 / 3])
    assert [point.measures[training] for point in points] == [pytest.approx(0.48), None, None, 0.0], (
        "a run once"
    )
    assert all(2 < (point.measures[nll] or 0) < 3 for point in points)


def test_a_panel_says_the_rank_correlation_and_has_a_style_a_way() -> None:
    points = [Related("a", f"{x}", {"x": x, "z": 1.0}, (x**3, 0.1)) for x in (1.0, 2.0, 3.0, 4.0)]
    points += [points[0], Related("b", "", {"x": None, "z": 2.0}, (5.0, 0.1))]
    figure = plot_relations("t", "y", {"4 bits": points, "3 bits": points[:2]})
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "4 bits: ρ = 1.00 (p = 0, 4 points)", (
        "what is unknown is left out, and a point counts once"
    )
    assert titles[2:] == ["3 bits: 2 points", "3 bits: 2 points"]
    drawn = [line.get_label() for line in figure.axes[1].get_legend_handles_labels()[0]]
    assert drawn == ["a", "b"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
