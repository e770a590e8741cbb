"""A table's page, LaTeX and CSV show what its content says, and run none of it."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from qtale_lightning.tables.render import latex, write_table

HOSTILE = "<script>a</script> | `b` *c* $d$ 5 % \\input{e} #f ~g ^h\n\nnew line"


@pytest.fixture
def content() -> dict[str, Any]:
    column = {"key": "average", "header": HOSTILE, "kind": "average", "data": "", "better": "higher"}
    columns = [column | {"factor": 100, "digits": 1}]
    row = {
        "name": HOSTILE, "method": HOSTILE, "setting": HOSTILE, "bits": 4, "engine": "native",
        "group": "", "options": {},
        "values": {"average": {"value": 0.5, "stderr": 0.1, "over": "questions", "seeds": [0.5], "best": True}},
        "paper": {}, "failed": {}, "sources": [],
    }  # fmt: skip
    failed = row | {"name": "=cmd|'/c calc'!A1", "values": {}, "failed": {"facts, seed 0": HOSTILE}}
    return {
        "table": HOSTILE, "title": HOSTILE, "model": HOSTILE, "data": [HOSTILE], "seeds": [0],
        "command": f"```\n{HOSTILE}", "base": [HOSTILE], "unlike_the_paper": [HOSTILE],
        "commits": [HOSTILE], "hardware": [HOSTILE], "protocols": {HOSTILE: {HOSTILE: HOSTILE}},
        "quantization": [HOSTILE], "questions": [20],
        "compare": ["bits"], "notes": [HOSTILE], "columns": columns, "rows": [row, failed],
        "differences": [{"row": 1, "against": 0, "values": {}}],
    }  # fmt: skip


def test_the_page_is_text(content: dict[str, Any], tmp_path: Path) -> None:
    write_table(content, tmp_path)
    html = (
        MarkdownIt("commonmark", {"html": True}).enable("table").render((tmp_path / "table.md").read_text())
    )
    assert "<script" not in html
    assert "<em" not in html
    assert html.count("&lt;script&gt;") > 10
    assert html.count("<h1") == 1


def test_spreadsheets_read_no_formula(content: dict[str, Any], tmp_path: Path) -> None:
    write_table(content, tmp_path)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert rows[1]["name"] == "'=cmd|'/c calc'!A1"
    assert rows[0]["average"] == "0.5"


def test_latex_runs_nothing_and_has_no_open_ends(content: dict[str, Any]) -> None:
    text = latex(content).split(r"\begin{table}")
    assert all(line.startswith("%") for line in text[0].splitlines())
    body = text[1]
    assert r"\input" not in body
    assert r"\textbackslash{}input\{e\}" in body
    assert "\n\n" not in body
    assert body.count("{") == body.count("}")
    (label,) = (line for line in body.splitlines() if line.startswith(r"\label"))
    assert set(label.removeprefix(r"\label{").removesuffix("}")) <= set(
        "abcdefghijklmnopqrstuvwxyz0123456789-:"
    )
