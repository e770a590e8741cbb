"""What a run is made from is known by content, wherever it lies."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from qtale_lightning.results.origin import origin
from qtale_lightning.run import identity


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    for task in ("piqa", "boolq"):
        (tmp_path / "a" / task).mkdir(parents=True)
        for split in ("train", "validation"):
            (tmp_path / "a" / task / f"{split}.jsonl").write_text(f'{{"question": "{task} {split}?"}}\n')
    return tmp_path / "a"


def made_from(root: Path | str | None, tasks: str = "piqa", path: str | None = None) -> dict[str, Any]:
    data = {"tasks": tasks, "root": None if root is None else str(root)}
    return origin({"model": {"path": path}, "data": data})


def test_the_same_rows_at_another_place_are_the_same(rows: Path) -> None:
    before = made_from(rows)
    (rows / "boolq" / "train.jsonl").write_text("not asked for")
    moved = Path(shutil.move(rows, rows.with_name("b")))
    assert made_from(moved) == before


@pytest.mark.parametrize("split", ["train", "validation", "calibration"])
def test_a_corrected_row_makes_other_rows(rows: Path, split: str) -> None:
    before = made_from(rows)
    (rows / "piqa" / f"{split}.jsonl").write_text('{"question": "corrected?"}\n')
    assert made_from(rows) != before


def test_other_tasks_of_a_folder_are_other_rows(rows: Path) -> None:
    assert made_from(rows, "boolq") != made_from(rows, "piqa")


def test_rows_that_are_no_files_here_are_told_by_their_name(rows: Path) -> None:
    assert made_from(None)["files"] is None
    assert made_from(rows, "facts")["files"] is None, "they are built in"
    assert made_from("/not/there")["files"] == "/not/there"


def test_a_moved_base_is_the_same_and_a_hubs_id_is_itself(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    before = made_from(None, path=str(base))
    assert made_from(None, path=str(base.rename(tmp_path / "moved"))) == before
    (tmp_path / "moved" / "config.json").write_text('{"hidden_size": 3}')
    assert made_from(None, path=str(tmp_path / "moved")) != before
    assert made_from(None, path="meta-llama/Llama-2-7b-hf")["base"] == "meta-llama/Llama-2-7b-hf"
    assert made_from(None)["base"] is None


def test_a_run_that_teaches_is_known_by_its_model(tmp_path: Path) -> None:
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    (model / "config.json").write_text("{}")
    config = {"model": {"teacher": str(tmp_path / "run")}}
    before = origin(config)
    assert identity(config, before) != identity(config, {**before, "teacher": "another"})
    (model / "config.json").write_text('{"hidden_size": 3}')
    assert origin(config) != before
    assert "teacher" not in made_from(None)
