"""What is there is used again: the second time, after an interruption, and by another table."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtale_lightning.experiments import find
from qtale_lightning.results.store import load_results, save_results
from tests.tables.files import folder, table

Arguments = Callable[..., list[str]]


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.is_file()}


@pytest.mark.slow
def test_the_second_time_nothing_runs_and_the_files_are_the_same(arguments: Arguments, commands: Any) -> None:
    given = arguments("csqa", "--seeds", "0,1")
    table(given, commands)
    assert commands.kinds() == ["fit"] * 6, "three methods and two seeds, each in one command"
    first = files(folder(given, "csqa"))
    assert set(first) == {"table.md", "table.tex", "table.csv", "table.json"}
    commands.started.clear()
    table(given, commands)
    assert commands.started == []
    assert files(folder(given, "csqa")) == first


@pytest.mark.slow
def test_interrupted_and_started_again_it_ends_with_the_same_table(
    arguments: Arguments, commands: Any, tmp_path: Path
) -> None:
    given = arguments("fairness")
    table(given, commands)
    whole, count = files(folder(given, "fairness")), len(commands.started)
    again = [str(tmp_path / "again") if part == str(tmp_path / "out") else part for part in given]
    commands.started.clear()
    for stop in (2, count // 2):
        commands.stops = stop
        with pytest.raises(KeyboardInterrupt):
            table(again, commands)
    commands.stops = None
    table(again, commands)
    assert len(commands.started) == count, "nothing ran twice"
    found = files(folder(again, "fairness"))
    assert found["table.csv"] == whole["table.csv"]
    assert found["table.md"].replace(b"/again", b"/out") == whole["table.md"]


@pytest.mark.slow
def test_rows_of_another_model_are_measured_again(arguments: Arguments, commands: Any) -> None:
    table(arguments("csqa"), commands)
    commands.started.clear()
    file = Path(arguments("csqa")[4]) / "tiny-qtale-facts-s0" / "model-awq-4bit" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"changed": True}))
    table(arguments("csqa"), commands)
    assert commands.kinds() == ["thresholds"]
    assert "[4]" in commands.started[0]


@pytest.mark.slow
def test_a_packed_model_of_another_export_is_made_again(arguments: Arguments, commands: Any) -> None:
    table(arguments("csqa"), commands)
    commands.started.clear()
    root = Path(arguments("csqa")[4]) / "tiny-qtale-facts-s0"
    file = root / "model-awq-4bit" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["made_from"] = {"model": "another"}
    file.write_text(json.dumps(config))
    table(arguments("csqa"), commands)
    assert commands.kinds() == ["quantize"]


@pytest.mark.slow
def test_rows_of_a_quick_look_answer_nothing(arguments: Arguments, commands: Any) -> None:
    table(arguments("csqa"), commands)
    commands.started.clear()
    root = Path(arguments("csqa")[4]) / "tiny-full-facts-s0"
    results = load_results(root)
    look: Any = [
        {**row, "examples": 3, "average": 0.9, "fingerprint": {**row["fingerprint"], "questions": "a few"}}
        for row in results["evaluation"]
    ]
    before = (folder(arguments("csqa"), "csqa") / "table.csv").read_bytes()
    save_results(root, {**results, "evaluation": [*look, *results["evaluation"]]})
    table(arguments("csqa"), commands)
    assert commands.started == []
    assert (folder(arguments("csqa"), "csqa") / "table.csv").read_bytes() == before


def rows_at(root: Path, text: str = "which?") -> list[str]:
    (root / "arc_easy").mkdir(parents=True, exist_ok=True)
    row = {"question": text, "answerKey": "A", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
    for split in ("train", "validation"):
        (root / "arc_easy" / f"{split}.jsonl").write_text(json.dumps(row))
    return ["--data.tasks", "arc_easy", "--data.root", str(root)]


@pytest.mark.slow
def test_rows_may_move_and_others_make_other_runs(
    arguments: Arguments, commands: Any, tmp_path: Path
) -> None:
    table(arguments("csqa", *rows_at(tmp_path / "a")), commands)
    assert commands.kinds() == ["fit"] * 3
    commands.started.clear()
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = ["--data.tasks", "arc_easy", "--data.root", str(tmp_path / "b")]
    table(arguments("csqa", *moved), commands)
    assert commands.started == []
    table(arguments("csqa", *moved, "--sweep.thresholds", "[0.5,0.1,0.3]"), commands)
    assert commands.kinds() == ["thresholds"]
    assert all(str(tmp_path / "b") in started for started in commands.started), "where the rows lie now"
    commands.started.clear()
    table(arguments("csqa", *rows_at(tmp_path / "b", "which, then?")), commands)
    assert commands.kinds() == ["fit"] * 3, "other rows are other runs"


@pytest.mark.slow
def test_a_run_of_the_same_configuration_is_used_again(
    arguments: Arguments, commands: Any, tmp_path: Path
) -> None:
    table(arguments("csqa"), commands)
    commands.started.clear()
    table(arguments("ablation"), commands)
    assert commands.started == [], "its runs are those of csqa"
    table(arguments("csqa", "--trainer.max_steps", "5"), commands)
    assert commands.kinds() == ["fit"] * 3, "another configuration is another run"
    roots = {file.parent.name for file in (tmp_path / "out").glob("*/*/config.yaml")}
    assert roots == {f"tiny-{method}-facts-s0" for method in ("full", "dllm", "qtale")}


TAUGHT = (
    "title: t\ncells:\n  - {name: a, method: METHOD, bits: [16], THETAafter: b, options: {model.distillation: 1}}\n"
    "  - {name: b, method: full, bits: [16]}\n"
)


@pytest.fixture(params=["qtale", "static"])
def taught(
    request: pytest.FixtureRequest, arguments: Arguments, declared: Callable[[str], Path]
) -> list[str]:
    """A table of a line that is declared before the one that its runs begin with."""
    theta = "theta: 0.5, " if request.param == "qtale" else ""
    text = TAUGHT.replace("METHOD", request.param).replace("THETA", theta)
    return [str(declared(text)), *arguments("mine")[1:]]


@pytest.mark.slow
def test_runs_that_begin_with_others_come_after_them(
    taught: list[str], commands: Any, tmp_path: Path
) -> None:
    """They are known again, wherever they lie, and others where what they began with is another."""
    table(taught, commands)
    first, second = commands.started
    full = tmp_path / "out" / "tiny-full-facts-s0"
    assert first[first.index("--out") + 1] == str(full.parent)
    assert second[second.index("--model.path") + 1] == str(full / "model")
    assert second[second.index("--model.teacher") + 1] == str(full)
    made = (tmp_path / "out" / "distillation=1-after=b").glob("tiny-*-facts-s0/results.json")
    assert len([*made]) == 1
    page = (folder(taught, "mine") / "table.json").read_bytes()
    commands.started.clear()
    table(taught, commands)
    assert commands.started == []
    assert (folder(taught, "mine") / "table.json").read_bytes() == page
    shutil.move(tmp_path / "out", tmp_path / "moved")
    moved = [str(tmp_path / "moved") if part == str(tmp_path / "out") else part for part in taught]
    table(moved, commands)
    assert commands.started == []
    config = tmp_path / "moved" / full.name / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.1}))
    table(moved, commands)
    assert [command[0] for command in commands.started if "--model.teacher" in command] == ["fit"]


@pytest.mark.slow
def test_what_begins_with_a_failed_run_is_not_started(
    taught: list[str], commands: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.fails = (str(find(Path("experiments/methods/full.yaml"))),)
    with pytest.raises(SystemExit):
        table(taught, commands)
    assert commands.kinds() == ["fit"]
    assert "with which it begins, isn't finished" in capsys.readouterr().out


@pytest.mark.slow
def test_without_distillation_nobody_teaches(
    arguments: Arguments, declared: Callable[[str], Path], commands: Any
) -> None:
    text = TAUGHT.replace("METHOD", "qtale").replace("THETA", "theta: 0.5, ")
    file = declared(text.replace(", options: {model.distillation: 1}", ""))
    table([str(file), *arguments("mine")[1:]], commands)
    second = commands.started[1]
    assert "--model.path" in second
    assert "--model.teacher" not in second
