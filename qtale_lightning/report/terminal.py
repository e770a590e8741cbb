"""Tables on a terminal, of any width: nothing is cut. What doesn't fit beside the rest goes on below it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import rich.box
import rich.table
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from qtale_lightning.report.markdown import WORDS

LABELS = {"precision", "θ", "method", "setting", "bits", "engine", "rule", "line", "against", "questions"}
"""Headings of columns that say what a row is about, where they come first: repeated where a table goes on below."""

GAP = 2
"""Columns of the terminal between two of a table."""


@dataclass
class FactTable:
    """A table of finished text, with a line below it; `emphasized` rows stand out in the terminal."""

    title: str
    headers: list[str]
    rows: list[list[str]] = field(default_factory=list)
    emphasized: set[int] = field(default_factory=set)
    caption: str = ""
    bold: set[tuple[int, int]] = field(default_factory=set)
    """Cells that stand out, as (row, column)."""


def print_table(table: FactTable, console: Console) -> None:
    """Prints a table, in parts where the terminal is too narrow for all of its columns."""
    parts = _parts(table, console.width)
    for number, columns in enumerate(parts):
        first, last = number == 0, number == len(parts) - 1
        shown = rich.table.Table(
            title=Text(table.title) if first and table.title else None,
            title_justify="left",
            title_style="bold",
            caption=Text(table.caption) if last and table.caption else None,
            caption_justify="left",
            box=rich.box.SIMPLE_HEAD,
            collapse_padding=True,
            pad_edge=False,
        )
        widths = _widths(table, columns, console.width)
        for column in columns:
            header = table.headers[column]
            figures = header not in WORDS and header not in LABELS
            shown.add_column(
                Text(_broken(header)),
                justify="left" if header in WORDS else "right",
                no_wrap=figures,
                overflow="fold",
                width=widths[column],
            )
        for index, row in enumerate(table.rows):
            cells = [
                Text(_cell(table, row, c, widths[c]), style="bold" if (index, c) in table.bold else "")
                for c in columns
            ]
            shown.add_row(*cells, style="bold green" if index in table.emphasized else None)
        console.print(shown, soft_wrap=False)


def print_page(page: str, console: Console) -> None:
    """Prints a Markdown page: its tables as `print_table` does, all else as it is written."""
    lines, at = page.splitlines(), 0
    tokens = MarkdownIt("commonmark").enable("table").parse(page)
    for index, token in enumerate(tokens):
        if token.type != "table_open" or token.map is None:
            continue
        start, end = token.map
        _print_lines(lines[at:start], console)
        closing = next(i for i in range(index, len(tokens)) if tokens[i].type == "table_close")
        print_table(_read(tokens[index:closing]), console)
        at = end
    _print_lines(lines[at:], console)


def _print_lines(lines: Sequence[str], console: Console) -> None:
    if text := "\n".join(lines).strip("\n"):
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _read(tokens: Sequence[Token]) -> FactTable:
    """A table from its Markdown."""
    rows: list[list[str]] = []
    bold = set()
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            children = token.children or []
            if any(child.type == "strong_open" for child in children):
                bold.add((len(rows) - 2, len(rows[-1])))  # behind the headings
            rows[-1].append("".join(child.content for child in children))
    return FactTable("", rows[0], rows[1:], bold=bold)


def _parts(table: FactTable, width: int) -> list[list[int]]:
    """Columns by part: as many as fit beside those that name a row, which take half of the width at most."""
    count = len(table.headers)
    needed = [_least(table, column) + GAP for column in range(count)]
    labels = 0
    while labels < count - 1 and table.headers[labels] in LABELS and sum(needed[: labels + 1]) <= width / 2:
        labels += 1
    names = list(range(max(1, labels)))
    parts = [list(names)]
    for column in range(len(names), count):
        if len(parts[-1]) > len(names) and sum(needed[c] for c in [*parts[-1], column]) > width:
            parts.append(list(names))
        parts[-1].append(column)
    return parts


def _widths(table: FactTable, columns: Sequence[int], width: int) -> dict[int, int]:
    """Of a part's columns: what each needs, and what is left over for the first that would be wider on one line."""
    widths = {column: min(_least(table, column), width - GAP) for column in columns}
    left = width - sum(widths.values()) - GAP * len(widths)
    for column in columns:
        lines = [*_broken(table.headers[column]).splitlines(), *(row[column] for row in table.rows)]
        more = min(left, max(map(cell_len, lines), default=0) - widths[column])
        if more > 0:
            widths[column] += more
            left -= more
    return widths


def _least(table: FactTable, column: int) -> int:
    """The width that a column needs: of its longest figure, or of the longest word."""
    header = table.headers[column]
    words = _broken(header).splitlines()
    for row in table.rows:
        cell = _cell(table, row, column, 0)
        words += cell.split() if header in WORDS | LABELS else [cell]
    return max(map(cell_len, words), default=0)


def _cell(table: FactTable, row: Sequence[str], column: int, width: int) -> str:
    """A cell as it is printed in so many columns of the terminal: a range of θ may be broken, too."""
    cell = row[column]
    return cell.replace("…", "… ") if table.headers[column] == "θ" and cell_len(cell) > width else cell


def _broken(header: str) -> str:
    """A heading in lines of a word each, but for the marks in it."""
    return header.replace(" / ", "/").replace(" ", "\n")
