"""A table from its command line: what it plans is what it runs, and failures are said."""

import json
import re
import shutil
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tables.conftest import OPTIONS, ROOT, FakeCommands
from tests.tables.files import folder, row_of, rows, table

Arguments = Callable[..., list[str]]


@pytest.mark.slow
def test_the_plan_is_said_and_nothing_runs(
    arguments: Arguments, commands: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    table(arguments("fairness", "--plan"), commands)
    said = capsys.readouterr().out
    assert commands.started == []
    assert "39 lines of 4 runs, 0 there and 4 to train" in said
    assert "by counted FLOPs, no run to go by yet" in said
    planned = int(said.split(" commands to run")[0].split()[-1])
    table(arguments("fairness"), commands)
    assert len(commands.started) == planned, "what was planned is what ran"
    capsys.readouterr()
    table(arguments("fairness", "--seeds", "0,1", "--plan"), commands)
    said = capsys.readouterr().out
    assert "4 there and 4 to train" in said
    assert "by 4 finished runs of tiny" in said


def test_options_of_a_cell_get_a_readable_folder(arguments: Arguments, commands: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    cell = "{name: a, method: qtale, bits: [16], theta: 0.5, options: {model.lambda_entropy: 2.0}}"
    file.write_text(f"title: t\ncells: [{cell}]\n", encoding="utf-8")
    table(arguments(str(file)), commands)
    assert (tmp_path / "out" / "lambda_entropy=2.0" / "tiny-qtale-facts-s0" / "config.yaml").is_file()


@pytest.mark.slow
def test_what_failed_is_said_and_the_rest_is_there(
    arguments: Arguments, commands: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.fails = ("quantize", "autoawq")
    given = arguments("quantizers")
    with pytest.raises(SystemExit) as ended:
        table(given, commands)
    assert ended.value.code == 1
    assert "error: it isn't there" in capsys.readouterr().out
    page = (folder(given, "quantizers") / "table.md").read_text(encoding="utf-8")
    assert page.count("| failed |") > 0
    failed = [row for row in rows(given, "quantizers") if row["failed"]]
    assert {row["engine"] for row in failed} == {"autoawq"}
    commands.fails = ()
    table(given, commands)
    assert not any(row["failed"] for row in rows(given, "quantizers"))


@pytest.mark.slow
def test_a_budget_like_another_line_is_what_that_line_measured(arguments: Arguments, commands: Any) -> None:
    given = arguments("fairness")
    table(given, commands)
    found = rows(given, "fairness")
    for bits in (16, 4, 3):
        qtale = row_of(found, "QTALE", bits)["values"]["execution_ratio"]["value"]
        dllm = row_of(found, "D-LLM at QTALE's ratio by θ", bits)["values"]["execution_ratio"]["value"]
        assert dllm == pytest.approx(qtale, abs=0.0005), "a budget has three digits"


@pytest.mark.slow
def test_a_line_like_one_that_failed_fails(arguments: Arguments, commands: Any) -> None:
    commands.fails = ("fit", "experiments/methods/qtale.yaml")
    given = arguments("fairness")
    with pytest.raises(SystemExit):
        table(given, commands)
    found = rows(given, "fairness")
    reason = row_of(found, "D-LLM at QTALE's ratio by θ", 4)["failed"]["facts, seed 0"]
    assert reason == "the line 'QTALE', whose ratio it takes, has no row"
    assert row_of(found, "D-LLM", 4)["values"]["nll"]


CALIBRATED = {"digest": "of them", "sequences": 40}


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished table, which no test changes."""
    out = tmp_path_factory.mktemp("made") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        table(["csqa", "--model", "tiny", "--out", str(out), *OPTIONS], FakeCommands())
    return out


@pytest.fixture
def made_table(made_once: Path, tmp_path: Path) -> Path:
    """Another such folder, where the tests' command lines look for it."""
    return shutil.copytree(made_once, tmp_path / "out")


def requantized(given: list[str], made: dict[str, Any]) -> None:
    """A precision of the first seed is another one now."""
    file = Path(given[4]) / "tiny-qtale-facts-s0" / "model-awq-4bit" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"]["made_from"] |= made
    file.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"group_size": 16}, "--quantize.group_size 16 instead of 32"),
        ({"symmetric": True}, "--quantize.symmetric True instead of False"),
        ({"refit_norm": False}, "--quantize.refit_norm False instead of True"),
        ({"patterns": {"*.down_proj": 8}}, "--quantize.patterns {'*.down_proj': 8} instead of {}"),
        ({"calibration": CALIBRATED | {"all": False}}, "--quantize.sequences 40 instead of"),
    ],
)
def test_a_precision_by_other_settings_is_refused_before_anything_runs(
    arguments: Arguments, commands: Any, made_table: Path, made: dict[str, Any], says: str
) -> None:
    """One seed's was requantized by hand; the other seed's would be made as the table asks."""
    requantized(arguments("csqa"), made)
    with pytest.raises(ValueError, match=re.escape(says)):
        table(arguments("csqa", "--seeds", "0,1"), commands)
    assert commands.started == []


@pytest.mark.slow
def test_as_many_sequences_as_there_are_answer_a_table_that_asks_for_more(
    arguments: Arguments, commands: Any, made_table: Path
) -> None:
    requantized(arguments("csqa"), {"calibration": CALIBRATED | {"all": True}})
    table(arguments("csqa"), commands)
    assert commands.kinds() == ["thresholds"], "of another model, but by the settings that are asked for"


@pytest.mark.slow
def test_what_the_table_makes_is_made_as_it_asks_and_it_says_so(arguments: Arguments, commands: Any) -> None:
    more = ("--quantize.symmetric", "true", "--quantize.sequential", "true")
    given = arguments("quantizers", "--quantize.patterns", '{"*.down_proj": 8}', *more)
    table(given, commands)
    assert "quantize" in commands.kinds()
    commands.started.clear()
    table(given, commands)
    assert commands.started == []
    page = (folder(given, "quantizers") / "table.md").read_text(encoding="utf-8")
    assert "Made at 4 bits, native: group_size 32, patterns {'\\*.down_proj': 8}, refit_norm True" in page


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--seeds", "0,x"), "--seeds: 'x' is no number: give numbers"),
        (("--model", "huge"), "--model huge: choose one of"),
        (("--data.root", "/not/there"), "/not/there: not a folder"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(
    arguments: Arguments, commands: Any, more: tuple[str, ...], says: str
) -> None:
    with pytest.raises((ArgumentError, ValueError, OSError), match=says):
        table(arguments("csqa", *more), commands)
    assert commands.started == []


def test_a_schedule_is_refused_where_no_answer_is_written(
    arguments: Arguments, commands: Any, tmp_path: Path
) -> None:
    """Before anything is trained, also where a line without one needs the same run."""
    file = tmp_path / "mine.yaml"
    cell = "{name: a, method: full, bits: [4], engine: [nested]"
    file.write_text(f'title: t\ncells: [{cell}}}, {cell}, bits_schedule: "0:4,1:3"}}]\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"0:4,1:3 .* those of facts are scored"):
        table(arguments(str(file)), commands)
    assert commands.started == []
