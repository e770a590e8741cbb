"""JSON Lines that are damaged, or that someone wrote by hand: each refusal names file, line and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from qtale_lightning.data import lines
from qtale_lightning.data.lines import read_rows
from qtale_lightning.data.readers import read_local

ROW = {"goal": "warm hands", "sol1": "wear gloves", "sol2": "hold ice", "label": 0}
GOOD = json.dumps(ROW).encode()


def write(folder: Path, *content: bytes) -> Path:
    path = folder / "piqa" / "train.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"\n".join(content))
    return path


DAMAGED: list[tuple[str, bytes, str]] = [
    (
        "invalid UTF-8",
        GOOD.replace(b"hold", b"h\xffld"),
        r"field 'sol2': not UTF-8 \(byte 0xff at character 57",
    ),
    ("UTF-16", "\ufeff{}".encode("utf-16-le"), r"not UTF-8 \(byte 0xff at character 1\)"),
    ("Latin-1", '{"goal": "caf\u00e9"}'.encode("latin-1"), "field 'goal': not UTF-8"),
    ("half a character", GOOD.replace(b"hold", b"\\uD83D"), r"field 'sol2': \\ud83d is half of a character"),
    (
        "half a character within",
        b'{"choices": {"text": ["a", "\\udc00"]}}',
        r"field 'choices.text': \\udc00 is half of a character",
    ),
    ("half a character in a name", b'{"a\\ud800": 1}', "is half of a character"),
    (
        "deep lists",
        b'{"goal": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "field 'goal': .*more than 100 deep",
    ),
    ("deep objects", b'{"sol1": ' + b'{"a":' * 100_000, "field 'sol1': .*more than 100 deep"),
    ("cut", GOOD[:60], r"not a JSON object: field 'sol2': Unterminated string .* \(character 55\)"),
    ("a number of 5,000 digits", b'{"label": ' + b"1" * 5000 + b"}", "not a JSON object"),
]


@pytest.mark.parametrize(
    ("content", "message"), [case[1:] for case in DAMAGED], ids=[case[0] for case in DAMAGED]
)
def test_damaged_lines_are_refused_with_file_line_and_field(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = write(tmp_path, GOOD, b"", content)
    with pytest.raises(ValueError, match=message) as refusal:
        read_local("piqa", tmp_path, "train")
    assert str(refusal.value).startswith(f"{path}:3: ")
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400 + len(str(path))
    str(refusal.value).encode()  # it can be printed


def test_a_line_that_never_ends_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 1000)
    long = json.dumps(ROW | {"sol1": "x" * 1000}).encode()
    path = write(tmp_path, GOOD, long)
    with pytest.raises(
        ValueError, match=r"train.jsonl:2: field 'sol1': the line is longer than 1,000"
    ) as refusal:
        read_local("piqa", tmp_path, "train")
    assert len(str(refusal.value)) < 300 + len(str(path))
    path.write_bytes(GOOD + b" " * (1000 - len(GOOD)))
    assert len(list(read_rows(path))) == 1


@pytest.mark.parametrize("mark", ["file", "joined"])
def test_a_byte_order_mark_is_no_part_of_a_row(tmp_path: Path, mark: str) -> None:
    """Some editors write one, and files that are joined have one in their middle."""
    bom = "\ufeff".encode()
    path = write(tmp_path, bom + GOOD, (bom if mark == "joined" else b"") + GOOD)
    assert [row for _, row in read_rows(path)] == [ROW, ROW]


def test_characters_that_are_whole_are_read(tmp_path: Path) -> None:
    """A pair of escapes is one character, and what only looks like an escape is text."""
    path = write(tmp_path, rb'{"goal": "\ud83d\ude00 \\ud800", "sol1": "\u00e9"}')
    assert [row for _, row in read_rows(path)] == [{"goal": "\U0001f600 \\ud800", "sol1": "\u00e9"}]


@pytest.mark.parametrize("value", [["x" * 1_000_000], [[[[[[[[1]]]]]]]], {"a": "b" * 1_000_000}])
def test_a_strange_value_is_shown_in_a_line(tmp_path: Path, value: Any) -> None:
    write(tmp_path, json.dumps(ROW | {"label": value}).encode())
    with pytest.raises(ValueError, match="field 'label'") as refusal:
        read_local("piqa", tmp_path, "train")
    assert len(str(refusal.value)) < 400 + len(str(tmp_path))
