"""What is there is used again: the second time, after an interruption, and by another table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtale_lightning.tables.command import table
from tests.tables.files import folder

Arguments = Callable[..., list[str]]


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.is_file()}


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


def test_interrupted_and_started_again_it_ends_with_the_same_table(
    arguments: Arguments, commands: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
        assert "goes on where this one was" in capsys.readouterr().out
    commands.stops = None
    table(again, commands)
    assert len(commands.started) == count, "nothing ran twice"
    found = files(folder(again, "fairness"))
    assert found["table.csv"] == whole["table.csv"]
    assert found["table.md"].replace(b"/again", b"/out") == whole["table.md"]


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
