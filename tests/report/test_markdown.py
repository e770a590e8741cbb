"""What Markdown shows is what it was given: judged by a parser of it."""

import io
from html import unescape
from pathlib import Path
from re import sub

import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from qtale_lightning.report import markdown, write_report
from qtale_lightning.results import Results, save_results

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a link](javascript:alert(1)) ![an image](http://example.org/x.png)",
    "[a][b] [c]: http://example.org",
    "a | b | c",
    "a \\| b",
    "ends with a backslash \\",
    "**bold** *it* __bold__ _it_ ~~gone~~",
    "code `in ``ticks` and ``` fences",
    "lines\n\n# a heading\n\n- a list",
    "# a heading",
    "- a list",
    "+ a list",
    "1. a list",
    "12) a list",
    "--- a rule",
    "===",
    "> a quotation",
    "    indented",
    "&lt;b&gt; &amp; &#35;",
    "<!-- a comment",
    "arc_easy acc_norm _a b_ a__b",
    "https://example.org/a_b",
    "[ ] a box",
    "θ = 0.5 ± 0.1, −3 % · €",
]


def shown(text: str) -> str:
    """The text of a page, without its elements."""
    return unescape(sub(r"<[^>]*>", "", PARSER.render(text))).strip()


def elements(text: str) -> set[str]:
    return {
        token.tag for token in PARSER.parse(text) for token in [token, *(token.children or [])] if token.tag
    }


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_shown_as_it_is(text: str) -> None:
    plain = " ".join(text.split())
    assert shown(markdown.escape(text)) == plain
    assert elements(markdown.escape(text)) == {"p"}
    assert shown(f"# {markdown.escape(text)}") == plain
    assert shown(markdown.bullets([text])) == plain
    assert elements(markdown.bullets([text])) == {"ul", "li", "p"}
    assert shown(markdown.bold(text)) == plain
    assert elements(markdown.bold(text)) == {"p", "strong"}


@pytest.mark.parametrize("text", HOSTILE)
def test_code_is_shown_as_it_is(text: str) -> None:
    assert shown(markdown.code(text)) == " ".join(text.split())
    assert elements(markdown.code(text)) == {"p", "code"}
    assert shown(markdown.block(text)) == text.strip()
    assert elements(markdown.block(text)) == {"code"}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_cell_holds_its_text_and_no_more(text: str) -> None:
    page = markdown.table(
        ["what", "NLL"], [[text, "1.0"], [markdown.code(text), "2.0"], [markdown.bold(text), "3.0"]]
    )
    rows = [line for line in PARSER.render(page).splitlines() if line.startswith("<td")]
    assert [unescape(sub(r"<[^>]*>", "", row)) for row in rows[1::2]] == ["1.0", "2.0", "3.0"]
    assert len(rows) == 6
    assert [unescape(sub(r"<[^>]*>", "", row)) for row in rows[::2]] == [" ".join(text.split())] * 3


def test_what_needs_no_escape_has_none() -> None:
    for text in (
        "smollm2-135m · qtale · csqa · seed 0",
        "prompt_style: cloze",
        "[+0.10, +0.50]",
        "a ≥ b & c",
    ):
        assert markdown.escape(text) == text
    assert markdown.escape(markdown.bold("a")) == "**a**"


def test_a_report_shows_results_as_they_are(qtale: Results, tmp_path: Path) -> None:
    """Whoever writes into results.json writes text, not markup: of the page, of a figure, of a terminal."""
    hostile = "<script>alert(1)</script> | [a](javascript:b) `c` $x^$ *d*\n\n# e [bold]f"
    plain = " ".join(hostile.split())
    assert "run" in qtale
    qtale["run"] |= {
        "model": hostile,
        "command": hostile,
        "hardware": hostile,
        "versions": {hostile: hostile},
    }
    for choice in qtale["selected"]:
        choice["rule"] = hostile
    for row in qtale["evaluation"]:
        row["protocol"] = {hostile: hostile}
        row["engine"] = hostile if row["bits"] != 16 else row["engine"]
        row["accuracy"] = {hostile: row["accuracy"]["piqa"]}
    for choice in qtale["selected"]:
        choice["engine"] = hostile if choice["bits"] != 16 else "none"
    save_results(tmp_path, qtale)
    console = Console(file=io.StringIO(), width=300)
    write_report(tmp_path, console)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "<script" not in PARSER.render(text)
    assert elements(text) & {"script", "a", "em"} == set()
    assert shown(text).count(plain) > 5
    assert "[bold]f" in console.file.getvalue()  # type: ignore[attr-defined]
