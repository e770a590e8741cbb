"""A table says what it builds on, and shows the paper's numbers in the paper's setting alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtale_lightning.experiments import CHECKOUT
from qtale_lightning.tables.declaration import load_declaration
from tests.tables.files import folder, table

pytestmark = pytest.mark.slow

Arguments = Callable[..., list[str]]


def merged(*files: str) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for file in files:
        for key, value in yaml.safe_load((CHECKOUT / "experiments" / file).read_text()).items():
            content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    return content


@pytest.fixture
def paper(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Arguments:
    """A table of one method with a value of a paper, whose setting for the tiny model is a file of this test."""
    setting = merged("base.yaml", "models/tiny.yaml")
    setting["trainer"]["max_steps"] = 4
    setting["sweep"] = {"thresholds": [0.5, 0.1]}
    setting["data"] |= {"tasks": "facts", "batch_size": 16}
    setting["trainer"]["accumulate_grad_batches"] = 2
    (tmp_path / "experiments/paper").mkdir(parents=True)
    (tmp_path / "experiments/paper/tiny.yaml").write_text(yaml.safe_dump(setting))
    file = tmp_path / "mine.yaml"
    file.write_text(
        "title: t\nbase: experiments/paper/{model}.yaml\ncolumns: [average]\n"
        "cells: [{name: full, method: full, bits: [16, 3]}]\n"
        "paper: [{model: tiny, cell: full, bits: 3, column: average, value: 72.22}]\n"
    )
    before = arguments(str(file))  # which changes the folder
    monkeypatch.chdir(tmp_path)
    return lambda *more: [*before, *more]


def page(given: list[str], data: str = "facts") -> str:
    return (folder(given, "mine", data) / "table.md").read_text(encoding="utf-8")


def test_the_papers_values_stand_beside_ours_in_its_setting(
    paper: Arguments, commands: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    given = paper()
    table(given, commands)
    assert "on experiments/paper/tiny.yaml:" in capsys.readouterr().out
    assert "| average %, the paper's |" in page(given)
    shown = [line.split("|")[-2].strip() for line in page(given).splitlines() if line.startswith("| full")]
    assert shown == ["", "72.22"]
    assert "Runs build on experiments/paper/tiny.yaml." in page(given)
    content = json.loads((folder(given, "mine") / "table.json").read_text(encoding="utf-8"))
    assert content["base"] == ["experiments/paper/tiny.yaml"]


@pytest.mark.parametrize(
    ("more", "option"),
    [
        (("--trainer.max_steps", "5"), "trainer.max_steps"),
        (("--data.limit_train", "64"), "data.limit_train"),
        (("--quantize.refit_norm", "false"), "quantize.refit_norm"),
        (("--model.lora_rank", "2"), "model.lora_rank"),
        (("--data.batch_size", "8"), "effective batch"),
        (("--data.tasks", "facts,arc_easy"), "data.tasks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_in_another_setting_they_are_left_out(
    paper: Arguments, commands: Any, more: tuple[str, ...], option: str
) -> None:
    given = paper(*more)
    table(given, commands)
    shown = page(given, "facts+arc_easy" if option == "data.tasks" else "facts")
    assert "72.22" not in shown
    assert f"The paper's values aren't shown where the setting is another: {option}." in shown


def test_where_and_how_it_runs_is_free(paper: Arguments, commands: Any) -> None:
    """The same effective batch is cut otherwise."""
    given = paper("--data.batch_size", "8", "--trainer.accumulate_grad_batches", "4", "--seeds", "7")
    table(given, commands)
    assert "72.22" in page(given)


def test_lines_by_another_engine_have_none(paper: Arguments, commands: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(file.read_text().replace("[16, 3]}", "[16, 3], engine: [native, rtn]}"))
    table(paper(), commands)
    shown = [line for line in page(paper()).splitlines() if line.startswith("| full | 3")]
    assert [("72.22" in line, "rtn" in line) for line in shown] == [(True, False), (False, True)]


def test_a_model_without_such_a_file_builds_on_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CHECKOUT)
    csqa = load_declaration(Path("experiments/tables/csqa.yaml"))
    own = (Path("experiments/base.yaml"), Path("experiments/models/tiny.yaml"))
    assert csqa.base_of("tiny") == own
    assert csqa.base_of("llama2-7b") == (Path("experiments/paper/llama2-7b.yaml"),)
    assert csqa.model_copy(update={"base": None}).base_of("tiny") == own
    one = csqa.model_copy(update={"base": "experiments/paper/llama2-7b.yaml"})
    assert one.base_of("llama2-7b") == (Path("experiments/paper/llama2-7b.yaml"),)
    with pytest.raises(ValueError, match=r"is of the model llama2-7b: give --model llama2-7b"):
        one.base_of("tiny")
    with pytest.raises(ValueError, match=r"base: experiments/nowhere\.yaml isn't there"):
        csqa.model_copy(update={"base": "experiments/nowhere.yaml"}).base_of("tiny")


def test_values_of_a_model_without_a_setting_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "title: t\ncells: [{name: full, method: full}]\n"
        "paper: [{model: tiny, cell: full, bits: 3, column: average, value: 1}]\n"
    )
    with pytest.raises(ValueError, match=r"no experiments/paper/tiny\.yaml, which says the setting"):
        load_declaration(file)
