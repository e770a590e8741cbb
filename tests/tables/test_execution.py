"""A table by real commands, and on W&B."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qtale_lightning.__main__ import main
from qtale_lightning.launching import Local
from qtale_lightning.locks import INHERITED
from qtale_lightning.tables.publish import publish
from tests.tables.files import table

Arguments = Callable[..., list[str]]


@pytest.mark.slow
def test_real_commands_make_a_table(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One real run, at its very smallest, by the commands themselves (in this process: starting one takes 10 s)."""
    file = tmp_path / "small.yaml"
    file.write_text(
        "title: t\ncompare: [name]\ncells:\n"
        "  - {name: QTALE, method: qtale, bits: [16, 3], theta: {rule: one-standard-error}}\n"
        "  - {name: at 0.7, method: qtale, bits: [3], theta: {rule: budget, budget: 0.7}}\n"
        "  - {name: at θ, method: qtale, bits: [3], theta: 0.45}\n",
        encoding="utf-8",
    )
    more = ["--data.limit_validation", "12", "--data.calibration_rows", "12", "--data.limit_train", "64"]
    given = arguments(str(file), *more, "--data.batch_size", "8", "--quantize.sequences", "32")
    kinds = []

    def start(command: Sequence[str], log: Path | None, lock: int | None) -> int:
        kinds.append(command[0])
        monkeypatch.setenv(INHERITED, str(lock))
        main(list(command))
        return 0

    table(given, Local(start=start))
    assert kinds == ["fit", "thresholds", "evaluate"]
    folder = tmp_path / "out/tables/small-tiny-facts"
    first = {one.name: one.read_bytes() for one in folder.glob("table.*")}
    assert b"failed |" not in first["table.md"]
    table(given, Local(start=start))
    assert len(kinds) == 3, "nothing is missing"
    assert {one.name: one.read_bytes() for one in folder.glob("table.*")} == first


@pytest.mark.slow
def test_wandb_gets_the_table(arguments: Arguments, commands: Any, tmp_path: Path) -> None:
    table(arguments("csqa"), commands)
    folder = tmp_path / "out/tables/csqa-tiny-facts"
    assert not (folder / "wandb").exists(), "--wandb disabled"

    content = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    publish(content, folder, ["--wandb=offline"])
    (record,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert record.stat().st_size > 0
    (shown,) = record.parent.glob("files/media/table/csqa_*.table.json")
    saved = json.loads(shown.read_text(encoding="utf-8"))
    assert len(saved["data"]) == len(content["rows"])
    at = saved["columns"].index("nll")
    assert [row[at] for row in saved["data"]] == [row["values"]["nll"]["value"] for row in content["rows"]]
