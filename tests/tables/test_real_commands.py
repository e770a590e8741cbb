"""Every declared table by the commands that it stands for, run for real on the tiny model, and its figures.

A table's repetitions are left out: all lines of all tables are made in `test_tables.py`, by commands that take no time.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtale_lightning.__main__ import main
from qtale_lightning.launching import Local
from qtale_lightning.locks import INHERITED
from qtale_lightning.quantization.engines import ENGINES
from qtale_lightning.report import figures as report_figures
from qtale_lightning.tables.declaration import FOLDER
from qtale_lightning.yaml_files import read_yaml
from tests.tables.files import NEEDED, figures, table

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL = (
    *("--data.batch_size", "8", "--data.limit_train", "48", "--data.limit_validation", "12"),
    *("--data.calibration_rows", "6", "--trainer.max_steps", "2", "--validations", "1"),
    # 32 sequences × 2 reserved tokens: enough for the search even in a layer that routers always skip.
    *("--quantize.sequences", "32", "--sweep.thresholds", "[0.5,0.1]", "--wandb", "disabled"),
)
TEXTS = ("--data.max_length", "1024", "--data.max_new_tokens", "3", "--data.generations", "2")
Arguments = Callable[[str], list[str]]


def in_process(arguments: Sequence[str], log: Path | None, lock: int | None) -> int:
    """A table's command without a process of its own, which would spend its time on imports."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(INHERITED, str(lock))
            main([*arguments])
    except SystemExit as ended:
        assert log is not None
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"error: {arguments[0]} ended with {ended.code}", encoding="utf-8")
        return int(ended.code or 0)
    return 0


def nothing(arguments: Sequence[str], log: Path | None, lock: int | None) -> int:
    raise AssertionError(f"it was there: {arguments}")


def shortened(declaration: dict[str, Any]) -> dict[str, Any]:
    """A table with every path of its own once.

    Without cells that differ from one before in numbers only, without a third value of an option or θ, and, but for the
    last cell, with one data set each, in turn.
    """
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell in declaration["cells"]:
        theta = cell.get("theta")
        rule = (theta["rule"], *theta) if isinstance(theta, dict) else type(theta)
        listed = (part for name in ("options", "perturb", "bits", "engine") for part in cell.get(name, ()))
        key = (cell["method"], rule, *listed)
        kept.setdefault(key, cell)
    *others, _ = cells = list(kept.values())
    for number, cell in enumerate(others):
        if data := cell.get("data"):
            cell["data"] = [data[number % len(data)]]
    for cell in cells:
        if isinstance(cell.get("theta"), list):
            cell["theta"] = cell["theta"][:2]
        for part in (cell.get("options", {}), cell.get("perturb", {})):
            part |= {name: value[:2] for name, value in part.items() if isinstance(value, list)}
    return declaration | {"cells": cells}


@pytest.fixture(scope="module")
def arguments(generality: Path, tmp_path_factory: pytest.TempPathFactory) -> Arguments:
    """A table's command line; all tables share their runs, as those of a user do."""
    out, declared = (tmp_path_factory.mktemp(name) for name in ("out", "declared"))

    def given(name: str) -> list[str]:
        more = ("--data.root", str(generality), *TEXTS) if name == "generality" else NEEDED.get(name, ())
        file = declared / f"{name}.yaml"
        text = yaml.safe_dump(shortened(read_yaml(ROOT / FOLDER / file.name)), allow_unicode=True)
        file.write_text(text, encoding="utf-8")
        runs = out / name if name in NEEDED else out  # of other options than those that the others share
        return [str(file), "--model", "tiny", "--out", str(runs), *SMALL, *more]

    return given


@pytest.fixture(autouse=True)
def nothing_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests run for real, and takes most of a small run's time: its own figures, and AutoAWQ's search."""
    monkeypatch.setattr(report_figures, "write_figures", lambda run_dir: [])
    monkeypatch.setitem(ENGINES, "autoawq", replace(ENGINES["rtn"], name="autoawq"))


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / FOLDER).glob("*.yaml")))
def test_a_table_and_its_figures(name: str, arguments: Arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = arguments(name)
    table(given, Local(start=in_process))
    (folder,) = (Path(given[given.index("--out") + 1]) / "tables").glob(f"{name}-*")
    file = folder / "table.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    assert not any(row["failed"] for row in content["rows"])
    for row in content["rows"]:
        found = [value["value"] if isinstance(value, dict) else value for value in row["values"]]
        assert sum(value is not None for value in found) >= 3, f"{row['name']} was measured"
    before = file.read_bytes()
    table(given, Local(start=nothing))
    assert file.read_bytes() == before
    figures(given)
    assert any((folder / "figures").glob("*.png"))
