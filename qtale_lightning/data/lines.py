"""JSON Lines as they come: rows of a file, each with its place, and what is wrong with one in terms of its field."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_LINE = 10_000_000
"""Characters of the longest line."""

MAX_DEPTH = 100
"""Of lists and objects within each other; deeper ones are refused where they can't be read."""

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")  # only such rows can hold half a character
_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)("?)|[{}\[\]:]', re.DOTALL)


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(``file:line``, row) of a file with one JSON object a line, in UTF-8, with or without a byte order mark.

    Blank lines are skipped.

    Raises:
        ValueError: A line isn't such an object, or is longer than `MAX_LINE`; names file, line and field.
    """
    # What isn't UTF-8 is read as lone surrogates, so that its line can be named.
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            place = f"{path}:{number}"
            if len(line) > MAX_LINE:
                field = _field(line, MAX_LINE)
                raise ValueError(
                    f"{place}: {field}the line is longer than {MAX_LINE:,} characters, which no question is: is it "
                    "one JSON object a line?"
                )
            if (line := line.lstrip("\ufeff")) and line.strip():
                yield place, _row(place, line)


def _row(place: str, line: str) -> dict[str, Any]:
    if bad := _SURROGATE.search(line):
        byte = ord(bad[0]) - 0xDC00
        raise ValueError(
            f"{place}: {_field(line, bad.start())}not UTF-8 (byte 0x{byte:02x} at character {bad.start() + 1}): save "
            "the file in that encoding"
        )
    try:
        row = json.loads(line)
    except RecursionError:
        field = _field(line, _depth_exceeded(line))
        raise ValueError(f"{place}: {field}lists or objects more than {MAX_DEPTH} deep") from None
    except json.JSONDecodeError as error:
        what = f"{_field(line, error.pos)}{error.msg} (character {error.pos + 1})"
        raise ValueError(f"{place}: not a JSON object: {what}") from error
    except ValueError as error:  # a number with thousands of digits
        raise ValueError(f"{place}: not a JSON object: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: not a JSON object: {line.strip()[:80]}")
    if _ESCAPED.search(line):
        for field, text in _texts(row):
            if bad := _SURROGATE.search(text):
                escape = f"\\u{ord(bad[0]):04x}"
                raise ValueError(
                    f"{place}: field '{field}': {escape} is half of a character, without the other"
                )
    return row


def _texts(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """All texts of a row with the names of their fields, such as 'choices.text'."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, path)
    elif isinstance(value, dict):
        for key, item in value.items():
            name = f"{path}.{key}".lstrip(".").encode("utf-8", "backslashreplace").decode()
            yield name, key
            yield from _texts(item, name)


def _depth_exceeded(line: str) -> int:
    """Where more than `MAX_DEPTH` lists and objects are open."""
    depth = 0
    for token in _TOKEN.finditer(line):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token[0], 0)
        if depth > MAX_DEPTH:
            return token.start()
    return len(line)


def _field(line: str, position: int) -> str:
    """ "field 'name': " of the row's field that a position of its line lies in; empty before the first."""
    depth, text, field = 0, "", ""
    for token in _TOKEN.finditer(line):
        if token.start() > position:
            break
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token[0], 0)
        if depth == 1 and token[0] == ":":
            field = text
        text = token[1] if token[1] is not None else text
    shown = field.encode("utf-8", "backslashreplace").decode()[:80]
    return f"field '{shown}': " if field else ""
