"""Markdown that says what it was given: text from a file is shown as it is, and never read as markup."""

import re
from collections.abc import Iterable, Sequence

WORDS = {"what", "value", "precision", "mark", "method", "setting", "engine", "rule", "line", "against"}
"""Headings of columns of text, which may be broken; others hold figures, and are aligned to the right."""

_ACTIVE = re.compile(
    r"""[\\`*<>|~$]           # marks anywhere: emphasis, code, HTML, cells, formulas
      | \](?=[(\[:])          # what would be a link
      | (?<![^\W_])_|_(?![^\W_])   # an underscore that isn't within a word
      | &(?=\#?\w+;)          # what would be an entity""",
    re.VERBOSE,
)
_OPENING = re.compile(r"^(\[(?=[ xX]\])|#{1,6}(?=\s|$)|[-+=](?=\s|$|[-+=])|\d+(?=[.)]\s))")


class Ready(str):
    """Text that is Markdown already."""

    __slots__ = ()


class Code(Ready):
    """A span of code, in which nothing is escaped but the bars of a table's cell."""

    __slots__ = ()


def escape(text: str) -> str:
    """Text in one line that Markdown, and the HTML in it, show as it is."""
    if isinstance(text, Ready):
        return text
    line = " ".join(text.split())
    escaped = _ACTIVE.sub(lambda found: f"\\{found[0]}", line)
    return _OPENING.sub(lambda found: _disarmed(found[0]), escaped)


def _disarmed(opening: str) -> str:
    """What would open a heading, a list or a rule, so that it doesn't."""
    return f"{opening}\\" if opening[0].isdigit() else f"\\{opening}"


def bold(text: str) -> Ready:
    """Text in bold."""
    return Ready(f"**{escape(text)}**")


def code(text: str) -> Code:
    """Text in one line as code, whatever backticks it has."""
    line = " ".join(text.split())
    fence = _fence(line, 1)
    gap = " " if line[:1] in ("`", "") or line[-1:] == "`" else ""
    return Code(f"{fence}{gap}{line}{gap}{fence}")


def block(text: str) -> Ready:
    """Lines of code, whatever backticks they have."""
    fence = _fence(text, 3)
    return Ready(f"{fence}\n{text}\n{fence}")


def _fence(text: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def bullets(lines: Iterable[str]) -> str:
    """A list."""
    return "\n".join(f"- {escape(line)}" for line in lines)


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; columns of figures are aligned to the right."""
    rules = [Ready("---" if header in WORDS else "---:") for header in headers]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in (headers, rules, *rows))


def _cell(text: str) -> str:
    return text.replace("|", r"\|") if isinstance(text, Code) else escape(text)
