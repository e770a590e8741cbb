"""What a result is known again by: content alone, and all of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qtale_lightning.digests import SAMPLE, of, of_base, of_model, of_rows, of_split
from qtale_lightning.results.fingerprints import fingerprint, same_questions


@dataclass(frozen=True)
class Row:
    text: tuple[int, ...]
    label: int


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "README.md").write_text("a card")
    (folder / "tokenizer_config.json").write_text("{}")
    generator = torch.Generator().manual_seed(0)
    weights = {f"layers.{i}": torch.randn(64, 64, generator=generator) for i in range(3)}
    save_file(weights, folder / "model.safetensors")
    return folder


def test_rows_are_known_by_what_they_ask_and_in_which_order() -> None:
    rows = [Row((1, 2), 0), Row((3,), 1)]
    assert of_rows(rows) == of_rows([Row((1, 2), 0), Row((3,), 1)])
    others = [[rows[0]], rows[::-1], [Row((1, 2), 1), rows[1]], [Row((1, 2, 3), 0), Row((), 1)]]
    assert len({of_rows(rows), *map(of_rows, others)}) == 5
    assert of_split({"a": "1", "b": "2"}) != of_split({"b": "2", "a": "1"}), "questions stand task after task"


@pytest.mark.parametrize("place", [100, -1])
def test_a_model_is_known_by_every_bit_of_its_weights(model: Path, place: int) -> None:
    before = of_model(model)
    flip(model / "model.safetensors", place)
    assert of_model(model) != before


def test_a_model_is_known_by_its_configuration_not_by_its_card_or_its_place(model: Path) -> None:
    before = of_model(model)
    (model / "README.md").write_text("another card")
    assert of_model(model.rename(model.with_name("elsewhere"))) == before
    folder = model.with_name("elsewhere")
    (folder / "config.json").write_text('{"model_type": "llama", "threshold": 0.3}')
    assert of_model(folder) != before
    assert of_model(folder, {"config.json": "as listed"}) not in (before, of_model(folder))


def test_a_base_is_known_by_the_beginning_of_every_tensor(model: Path) -> None:
    before = of_base(model)
    assert of_base(model.rename(model.with_name("elsewhere"))) == before
    folder = model.with_name("elsewhere")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for tensor in range(3):
        flip(weights, len(content) - (3 - tensor) * 64 * 64 * 4 + SAMPLE - 1)
        assert of_base(folder) != before
        weights.write_bytes(content)
    assert of_base(folder) == before
    (folder / "config.json").write_text("{}")
    assert of_base(folder) != before


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 20, *(bytes([len(text), *bytes(7)]) + text for text in (b"{}", b"null", b"{"))]
)
def test_weights_that_are_none_are_left_to_who_loads_them(model: Path, content: bytes) -> None:
    before = of_base(model)
    (model / "model.safetensors").write_bytes(content)
    assert of_base(model) != before


def test_where_questions_came_from_is_no_part_of_how_they_are_asked() -> None:
    protocol: dict[str, Any] = {"prompt_style": "cloze", "root": "a", "limit_validation": 20, "seed": 0}
    elsewhere = protocol | {"root": "b", "limit_validation": None, "seed": 1}
    assert fingerprint("m", None, "q", protocol) == fingerprint("m", None, "q", elsewhere)
    assert fingerprint("m", None, "q", protocol) != fingerprint(
        "m", None, "q", protocol | {"prompt_style": "choice"}
    )
    assert of({"a": 1, "b": 2}) == of({"b": 2, "a": 1})


def test_rows_of_results_are_compared_by_content_where_they_say_it() -> None:
    made = {"model": "m", "questions": "q", "protocol": "p"}
    row = {"examples": 20, "protocol": {"prompt_style": "cloze", "root": "a"}, "fingerprint": made}
    assert same_questions(row, row | {"fingerprint": made | {"model": "another"}})
    assert not same_questions(row, row | {"fingerprint": made | {"questions": "as many others"}})
    assert not same_questions(row, row | {"fingerprint": made | {"protocol": "another"}})
    old = {key: value for key, value in row.items() if key != "fingerprint"}
    assert same_questions(old, row | {"protocol": {"prompt_style": "cloze", "root": "b"}})
    assert not same_questions(old | {"examples": 21}, row)
