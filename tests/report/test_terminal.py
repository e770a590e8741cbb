"""Tables on terminals of any width: every figure is there, and none is cut."""

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from qtale_lightning.report import markdown, print_summary
from qtale_lightning.report.tables import evaluation_table, search_table, selection_table
from qtale_lightning.report.terminal import FactTable, print_page, print_table
from qtale_lightning.results import Results

Row = Callable[..., Any]


def printed(table: FactTable, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_table(table, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def wide(qtale: Results, row: Row) -> Results:
    """A run with all that makes tables wide: two engines, a θ for each layer, a search with differences, long times."""
    theta = [0.05, 0.3123, 0.612]
    extra: Any = row(4, 0.3, 0.6, engine="autoawq", seconds=12345.6) | {"theta": theta}
    qtale["evaluation"].append(extra)
    choice: Any = next(choice for choice in qtale["selected"] if choice["bits"] == 4)
    choice |= {"theta": theta, "budget": 0.7, "passes": 6100, "seconds": 12345.4, "engine": "autoawq"}
    choice |= {
        "rule": "layer-budget: a θ for each layer",
        "difference": {"value": -0.01, "low": -0.02, "high": 0.003},
    }
    return qtale


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_cell_is_cut(wide: Results, width: int) -> None:
    for table in (
        selection_table(wide),
        search_table(wide),
        evaluation_table(wide),
        evaluation_table(wide, brief=True),
    ):
        text = printed(table, width)
        assert "…" not in text.replace("0.05…", "")
        assert max(map(len, text.splitlines())) <= width
        figures = [
            cell for row in table.rows for cell in row if cell[:1].isdigit() and " by layer" not in cell
        ]
        assert all(cell in text for cell in figures if "-bit" not in cell)
        for header in table.headers:
            assert all(word in text for word in header.replace(" / ", "/").split())


def test_a_theta_for_each_of_many_layers_leaves_tables_whole(qtale: Results, row: Row) -> None:
    """80 columns hold a run's tables with it as they do without."""
    theta = [0.00484123, *([0.3123] * 26), 0.612]
    qtale["evaluation"].append({**row(4, 0.3, 0.6), "theta": theta})
    next(choice for choice in qtale["selected"] if choice["bits"] == 4)["theta"] = theta
    for table in (selection_table(qtale), search_table(qtale), evaluation_table(qtale, brief=True)):
        text = printed(table, 80)
        assert text.count("─\n") + text.count("─ \n") == 1, text


def test_a_part_repeats_what_names_its_rows() -> None:
    headers = ["precision", "θ", *(f"figure {n}" for n in range(8))]
    rows = [
        ["16-bit", "0.5", *(f"{n}.123456" for n in range(8))],
        ["4-bit", "0.3", *(f"{n}.654321" for n in range(8))],
    ]
    text = printed(FactTable("Title", headers, rows, caption="behind all of it"), 50)
    parts = text.count("precision")
    assert parts > 1
    assert text.count("16-bit") == text.count("4-bit") == parts
    assert text.count("Title") == text.count("behind all of it") == 1


def test_a_table_that_fits_is_one(qtale: Results) -> None:
    assert printed(selection_table(qtale), 80).count("precision") == 1


def test_a_page_is_printed_with_its_tables_and_all_else_as_it_stands() -> None:
    table = markdown.table(
        ["method", *(f"column {n}" for n in range(9))], [["a|b", *[markdown.bold("12.34 ± 5.67")] * 9]]
    )
    console = Console(file=io.StringIO(), width=80)
    print_page(f"# A page\n\n{table}\n\n- a note of [brackets]\n\n```\nmake table TABLE=x\n```\n", console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith("# A page\n")
    assert text.endswith("- a note of [brackets]\n\n```\nmake table TABLE=x\n```\n")
    assert text.count("12.34 ± 5.67") == 9
    assert "a|b" in text
    assert "**" not in text


def test_a_summary_leaves_markup_alone(qtale: Results) -> None:
    console = Console(file=io.StringIO(), width=80)
    qtale["run"]["hardware"] = "a [/b] machine"
    print_summary(qtale, console)
    assert "a [/b] machine" in console.file.getvalue()  # type: ignore[attr-defined]
