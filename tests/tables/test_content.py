"""What a table says: every number with its error, its sources and the paper's value."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tables.files import folder, row_of, rows, table

Arguments = Callable[..., list[str]]
Declared = Callable[[str], Path]


@pytest.mark.slow
def test_numbers_are_traceable(arguments: Arguments, commands: Any, tmp_path: Path) -> None:
    given = arguments("csqa", "--seeds", "0,1")
    table(given, commands)
    row = row_of(rows(given, "csqa"), "QTALE", 3)
    value = row["values"]["nll"]
    assert [source["run"] for source in row["sources"]] == ["tiny-qtale-facts-s0", "tiny-qtale-facts-s1"]
    recorded = []
    for source in row["sources"]:
        results = json.loads((tmp_path / "out" / source["run"] / "results.json").read_text(encoding="utf-8"))
        (match,) = [
            one for one in results["evaluation"] if all(one[key] == at for key, at in source["row"].items())
        ]
        recorded.append(match["average_nll"])
        assert source["commit"] == "0123456789"
    assert value["seeds"] == recorded
    assert value["value"] == pytest.approx(sum(recorded) / 2)
    # The standard error of a mean of two: half their distance.
    assert value["stderr"] == pytest.approx(abs(recorded[0] - recorded[1]) / 2)
    assert value["over"] == "seeds"
    with (folder(given, "csqa") / "table.csv").open(encoding="utf-8", newline="") as file:
        record = next(r for r in csv.DictReader(file) if (r["name"], r["bits"]) == ("QTALE", "3"))
    assert float(record["nll"]) == pytest.approx(value["value"])


@pytest.mark.slow
def test_one_seed_has_its_error_over_questions(arguments: Arguments, commands: Any) -> None:
    given = arguments("csqa")
    table(given, commands)
    value = row_of(rows(given, "csqa"), "full", 16)["values"]["nll"]
    assert (value["over"], value["stderr"]) == ("questions", 0.05)
    page = (folder(given, "csqa") / "table.md").read_text(encoding="utf-8")
    assert "Seed 0; ± is the standard error over questions." in page
    assert "Commit: 0123456789." in page
    assert "prompt_style: cloze" in page
    assert page.rstrip().splitlines()[-2].startswith("python -m qtale_lightning table csqa --model tiny")


@pytest.mark.slow
def test_differences_are_to_the_first_of_a_group(arguments: Arguments, commands: Any) -> None:
    given = arguments("fairness")
    table(given, commands)
    content = json.loads((folder(given, "fairness") / "table.json").read_text(encoding="utf-8"))
    found = content["rows"]
    pairs = [(found[one["row"]], found[one["against"]]) for one in content["differences"]]
    assert {first["name"] for _, first in pairs} == {"QTALE", "QTALE at a ratio of 0.8"}
    assert all((row["bits"], row["group"]) == (first["bits"], first["group"]) for row, first in pairs)
    for one, (row, first) in zip(content["differences"], pairs, strict=True):
        apart = one["values"]["average"]
        expected = row["values"]["average"]["value"] - first["values"]["average"]["value"]
        assert apart["value"] == pytest.approx(expected, abs=1e-9)
    page = (folder(given, "fairness") / "table.md").read_text(encoding="utf-8")
    assert "| line | against | bits | average % | nll ↓ |" in page
