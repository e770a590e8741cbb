"""Every declared table at its smallest: its lines have rows, its files can be read, its figures can be drawn."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtale_lightning.tables.declaration import FOLDER, load_declaration
from qtale_lightning.tables.plots import plot_frontier
from tests.tables.files import NEEDED, figures, table

Arguments = Callable[..., list[str]]
TABLES = sorted(file.stem for file in (Path(__file__).parents[2] / FOLDER).glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_a_declared_table_is_made(name: str, arguments: Arguments, commands: Any, tmp_path: Path) -> None:
    given = [*arguments(name), *NEEDED.get(name, ())]
    table(given, commands)
    (folder,) = (tmp_path / "out" / "tables").iterdir()
    content = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    assert len(content["rows"]) == len(load_declaration(FOLDER / f"{name}.yaml").lines)
    assert not any(row["failed"] for row in content["rows"])
    assert all(len(row["values"]) == len(content["columns"]) for row in content["rows"])
    tex = (folder / "table.tex").read_text(encoding="utf-8")
    assert r"\toprule" in tex
    assert tex.split(r"\begin{table}")[1].isascii(), "pdflatex reads it"


@pytest.mark.slow
def test_every_figure_has_its_formats_and_caption(
    arguments: Arguments, commands: Any, tmp_path: Path
) -> None:
    given = arguments("sensitivity")
    table(given, commands)
    figures(given)
    folder = tmp_path / "out/tables/sensitivity-tiny-facts/figures"
    drawn = {file.stem for file in folder.glob("*.png")}
    assert drawn == {"frontier", "logit-gap", "flips", "layers", "heatmap"}
    for name in drawn:
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        caption = (folder / f"{name}.md").read_text(encoding="utf-8")
        assert f"]({name}.png)" in caption
        assert "QTALE, λ₂ = 2.0: 4 steps, seed 0 (`lambda_entropy=2.0/tiny-qtale-facts-s0`)" in caption
        assert "python -m qtale_lightning figures sensitivity" in caption
        assert "Commit: 0123456789." in caption


@pytest.mark.slow
def test_runs_of_a_method_without_theta_are_points_of_one_curve(
    arguments: Arguments, commands: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, seen = tmp_path / "small.yaml", {}
    file.write_text(
        "title: t\ncells:\n"
        "  - {name: static, method: static, options: {model.target_ratio: [0.7, 0.5]}, bits: [16]}\n"
        "  - {name: QTALE, method: qtale, theta: [0.5, 0.1], bits: [16]}\n",
        encoding="utf-8",
    )

    def plot(title: str, panels: Any, styles: Any) -> Any:
        seen.update(panels["16 bits"])
        return plot_frontier(title, panels, styles)

    monkeypatch.setattr("qtale_lightning.tables.figures.plot_frontier", plot)
    given = arguments(str(file))
    table(given, commands)
    figures(given)
    assert {name: [point.ratio for point in points] for name, points in seen.items()} == {
        "static": [0.5, 0.7],
        "QTALE": [0.5, 0.9],
    }


@pytest.mark.slow
def test_data_sets_have_columns_of_their_own(arguments: Arguments, commands: Any, tmp_path: Path) -> None:
    table(arguments("generality"), commands)
    page = (tmp_path / "out/tables/generality-tiny-mmlu+alpaca+samsum/table.md").read_text(encoding="utf-8")
    header = page.splitlines()[2]
    for name in ("MMLU %", "Alpaca perplexity ↓", "SAMSum ROUGE-L %", "alpaca nll ↓"):
        assert f"| {name} |" in header
    assert len(commands.started) == 9, "three methods, three data sets"


@pytest.mark.slow
def test_figures_are_the_same_twice(arguments: Arguments, commands: Any, tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(
        "title: t\ncells: [{name: QTALE, method: qtale, theta: 0.5, bits: [16]}]\n", encoding="utf-8"
    )
    given = arguments(str(file), "--seeds", "0,1")
    table(given, commands)

    def drawn() -> dict[str, bytes]:
        figures(given)
        return {
            one.name: one.read_bytes() for one in (tmp_path / "out/tables/small-tiny-facts/figures").iterdir()
        }

    first = drawn()
    assert {Path(name).stem for name in first} == {"frontier", "logit-gap", "flips", "layers"}, (
        "λ₂ isn't varied"
    )
    assert drawn() == first


@pytest.mark.slow
def test_figures_of_nothing_say_what_to_do(arguments: Arguments) -> None:
    with pytest.raises(FileNotFoundError, match="`make table TABLE=csqa` makes them"):
        figures(arguments("csqa"))


@pytest.mark.slow
def test_figures_of_a_part_say_what_is_left_out(
    arguments: Arguments, commands: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "small.yaml"
    cells = "[{name: full, method: full, bits: [16]}, {name: static, method: static, bits: [16]}]"
    file.write_text(f"title: t\ncells: {cells}\n", encoding="utf-8")
    commands.fails = ("experiments/methods/full.yaml",)
    with pytest.raises(SystemExit):
        table(arguments(str(file)), commands)
    capsys.readouterr()
    figures(arguments(str(file)))
    assert "1 of 2 runs aren't there" in capsys.readouterr().out
