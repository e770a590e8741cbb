"""The results file: round trips, replacing rows, helpful errors, and writes that never leave half a file."""

import copy
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtale_lightning.manifest import DamagedFileError
from qtale_lightning.report.notes import protocol_lines
from qtale_lightning.results import (
    Results,
    load_results,
    save_results,
    update_results,
    upsert_evaluation,
    validate,
)
from qtale_lightning.results.metadata import git_state, run_metadata
from qtale_lightning.results.schema import Evaluation
from qtale_lightning.results.series import own_rows, selected_row, validation_series
from qtale_lightning.results.store import same_theta

Row = Callable[..., Evaluation]


def test_a_saved_file_reads_back_the_same(tmp_path: Path, qtale: Results, full: Results) -> None:
    for results in (qtale, full):
        assert save_results(tmp_path, results) == tmp_path / "results.json"
        assert load_results(tmp_path) == results


def test_the_file_is_plain_json_with_readable_text(tmp_path: Path, qtale: Results) -> None:
    qtale["selected"][0]["rule"] = "smallest θ"
    text = save_results(tmp_path, qtale).read_text("utf-8")
    assert "smallest θ" in text
    assert json.loads(text)["schema"] == 1


KEPT = Path(__file__).parents[2] / "experiments" / "results"


def test_results_of_now_identify_themselves() -> None:
    results = validate(
        json.loads((KEPT / "gemma3-270m/facts-qtale-s0/results.json").read_text(encoding="utf-8"))
    )
    assert len(own_rows(results)) == 18  # six θ at three precisions
    assert not any("have none of this version" in line for line in protocol_lines(results))


OLD = sorted((KEPT / "smollm2-135m" / "runs").rglob("*-csqa-s0/results.json"))


@pytest.mark.parametrize("file", OLD, ids=lambda file: file.parent.name)
def test_results_of_before_are_readable_and_say_that_nothing_identifies_them(file: Path) -> None:
    results = validate(json.loads(file.read_text(encoding="utf-8")))
    count = len(own_rows(results))
    assert count
    assert any(
        f"{count} of {count} rows have none of this version" in line for line in protocol_lines(results)
    )


def test_missing_results_name_the_commands_that_make_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"results\.json.*make train.*evaluate"):
        load_results(tmp_path)


def test_text_that_is_no_json_is_located(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"schema": 1,\n "run": oops}')
    with pytest.raises(ValueError, match=r"results\.json, line 2, column 9: not JSON"):
        load_results(tmp_path)


def drop_task_stderr(results: Any) -> None:
    del results["evaluation"][2]["accuracy"]["piqa"]["stderr"]


def give_percent(results: Any) -> None:
    results["evaluation"][0]["average"] = 57.2


def give_text(results: Any) -> None:
    results["train"]["steps"] = "1500"


def give_nan(results: Any) -> None:
    results["train"]["final_losses"]["ce"] = float("nan")


def give_split(results: Any) -> None:
    results["evaluation"][0]["split"] = "test"


def give_theta(results: Any) -> None:
    results["selected"][1]["theta"] = 1.5


def give_schema(results: Any) -> None:
    results["schema"] = 2


def give_half_a_run(results: Any) -> None:
    del results["run"]["command"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_task_stderr, r"evaluation\.2\.accuracy\.piqa\.stderr: is missing\nWritten by: .* evaluate"),
        (give_percent, r"evaluation\.0\.average: .*less than or equal to 1, not 57\.2"),
        (give_text, r"train\.steps: .*integer, not '1500'\nWritten by: .* fit"),
        (give_nan, r"train\.final_losses\.ce: .*finite.*, not nan"),
        (give_split, r"evaluation\.0\.split: .*'calibration' or 'validation', not 'test'"),
        (give_theta, r"selected\.1\.theta.*: .*less than or equal to 1, not 1\.5\nWritten by: .* thresholds"),
        (give_schema, r"schema: .*1, not 2"),
        (give_half_a_run, r"run\.command: is missing"),
    ],
)
def test_validation_names_the_key_and_the_fault(
    tmp_path: Path, qtale: Results, damage: Callable[[Any], None], message: str
) -> None:
    damaged = copy.deepcopy(qtale)
    damage(damaged)
    with pytest.raises(ValueError, match=message):
        validate(damaged)
    save_results(tmp_path, qtale)
    with pytest.raises(ValueError, match=message):
        save_results(tmp_path, damaged)
    assert load_results(tmp_path) == qtale
    (tmp_path / "results.json").write_text(json.dumps(damaged))
    with pytest.raises(
        DamagedFileError, match=r"results\.json isn't what this run wrote .*: remove it and start"
    ):
        load_results(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(
        DamagedFileError, match=r"(?s)results\.json isn't a valid results file.*Or remove it and start"
    ):
        load_results(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 1', "[" * 100_000])
def test_a_file_that_holds_no_results_is_named_with_the_way_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(
        DamagedFileError, match=r"(?s)results\.json.*remove it and start the run's command again"
    ):
        load_results(tmp_path)


def test_many_faults_are_counted_not_listed(qtale: Results) -> None:
    for row in qtale["evaluation"]:
        row["average"] = -1.0
    with pytest.raises(ValueError, match=f"and {len(qtale['evaluation']) - 5} more"):
        validate(qtale)


@pytest.mark.parametrize("content", [[], "results", None])
def test_something_else_than_an_object_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match="top level"):
        validate(content)


def test_sections_are_added_one_by_one(tmp_path: Path, qtale: Results) -> None:
    update_results(tmp_path, "run", qtale["run"])
    update_results(tmp_path, "train", qtale["train"])
    results = update_results(tmp_path, "selected", qtale["selected"])
    assert results == load_results(tmp_path)
    assert results["run"] == qtale["run"]
    assert results["evaluation"] == []
    assert "routing" not in results


def test_an_unknown_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no section 'evaluations'; the sections are run, train"):
        update_results(tmp_path, "evaluations", [])
    assert not (tmp_path / "results.json").exists()


def test_rows_are_kept_in_order_whatever_order_they_come_in(tmp_path: Path, row: Row) -> None:
    wanted = [
        ("calibration", 4, "native", 0.4),
        ("validation", 16, "none", 0.5),
        ("validation", 4, "autoawq", 0.3),
        ("validation", 4, "native", 0.5),
        ("validation", 4, "native", 0.3),
        ("validation", 4, "native", 0.0),
        ("validation", 4, "native", None),
        ("validation", 3, "native", 0.9),
    ]
    for split, bits, engine, theta in wanted[::-1][::2] + wanted[::2]:
        upsert_evaluation(tmp_path, row(bits, theta, 0.5, split=split, engine=engine))
    rows = load_results(tmp_path)["evaluation"]
    assert [(row["split"], row["bits"], row["engine"], row["theta"]) for row in rows] == wanted


def test_a_row_of_the_same_model_and_theta_is_replaced(tmp_path: Path, row: Row) -> None:
    upsert_evaluation(tmp_path, row(4, 0.3, 0.5))
    upsert_evaluation(tmp_path, row(4, 0.2, 0.5))
    results = upsert_evaluation(tmp_path, row(4, 0.1 + 0.2, 0.6))
    assert [row["average"] for row in results["evaluation"]] == [0.6, 0.5]
    assert load_results(tmp_path) == results
    upsert_evaluation(tmp_path, row(4, 0.3, 0.6, split="calibration"))
    assert len(upsert_evaluation(tmp_path, row(4, None, 0.6))["evaluation"]) == 4


def test_rows_with_a_threshold_for_each_layer(tmp_path: Path, row: Row) -> None:
    """They stand behind those with one for all, are told apart, and replaced by the same ones."""
    by_layer: list[Any] = [[0.3, 0.1], [0.3, 0.2], 0.3, [0.5, 0.1], 0.0, 0.5]
    for theta in by_layer:
        upsert_evaluation(tmp_path, {**row(4, 0.3, 0.5), "theta": theta})
    results = upsert_evaluation(tmp_path, {**row(4, 0.3, 0.6), "theta": [0.1 + 0.2, 0.1]})
    found = [row["theta"] for row in results["evaluation"]]
    assert found == [0.5, 0.3, 0.0, [0.5, 0.1], [0.3, 0.2], [0.1 + 0.2, 0.1]]
    assert results["evaluation"][-1]["average"] == 0.6
    assert load_results(tmp_path) == results
    with pytest.raises(ValueError, match=r"theta.*less than or equal to 1, not 1\.5"):
        upsert_evaluation(tmp_path, {**row(4, 0.3, 0.5), "theta": [0.3, 1.5]})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (0.3, 0.1 + 0.2, True),
        (0.3, 0.300001, False),
        (None, None, True),
        (None, 0.0, False),
        ([0.3, 0.2], [0.1 + 0.2, 0.2], True),
        ([0.3, 0.2], [0.2, 0.3], False),
        ([0.3, 0.2], [0.3], False),
        ([0.3], 0.3, False),
        ([0.3], None, False),
    ],
)
def test_the_same_threshold(one: Any, other: Any, same: bool) -> None:
    assert same_theta(one, other) is same
    assert same_theta(other, one) is same


def test_the_first_budget_is_the_selected_row(qtale: Results) -> None:
    """Where each of several has its own θ, in the order in which they were given."""
    choice = next(choice for choice in qtale["selected"] if choice["bits"] == 4)
    others = [{**choice, "theta": theta, "budget": theta} for theta in (0.2, 0.7)]
    qtale["selected"] = [*others, *qtale["selected"]]  # type: ignore[list-item]
    row = selected_row(qtale, validation_series(qtale)["4-bit"])
    assert row is not None
    assert row["theta"] == 0.2


def test_a_bad_row_is_refused_and_changes_nothing(tmp_path: Path, row: Row) -> None:
    upsert_evaluation(tmp_path, row(4, 0.3, 0.5))
    before = (tmp_path / "results.json").read_bytes()
    bad: Any = row(4, 0.2, 0.5)
    del bad["theta"]
    with pytest.raises(ValueError, match=r"the new row for .*\n.*theta: is missing"):
        upsert_evaluation(tmp_path, bad)
    assert (tmp_path / "results.json").read_bytes() == before


def test_a_failing_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, qtale: Results, full: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_results(tmp_path, qtale)

    def write_half(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text[: len(text) // 2].encode(encoding))
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_half)
        with pytest.raises(OSError, match="no space left"):
            save_results(tmp_path, full)
    assert load_results(tmp_path) == qtale
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
        with pytest.raises(OSError, match="read-only"):
            save_results(tmp_path, full)
    assert load_results(tmp_path) == qtale
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "results.json"]


def test_what_json_cannot_hold_is_refused_before_writing(tmp_path: Path, row: Row) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        upsert_evaluation(tmp_path, row(4, 0.3, 0.5, protocol={"temperature": float("inf")}))
    assert list(tmp_path.iterdir()) == []


def test_series_split_by_precision_and_by_engine_where_it_matters(qtale: Results, row: Row) -> None:
    qtale["evaluation"] += [row(4, 0.4, 0.5, engine="autoawq"), row(4, 0.4, 0.5, split="calibration")]
    series = validation_series(qtale)
    assert list(series) == ["16-bit", "4-bit autoawq", "4-bit native", "3-bit"]
    assert len(series["4-bit autoawq"]) == 1
    assert [row["theta"] for row in series["3-bit"]] == sorted(
        (row["theta"] for row in series["3-bit"]), reverse=True
    )


def test_the_selected_row_is_that_of_its_engine(qtale: Results, row: Row) -> None:
    qtale["evaluation"] += [row(4, theta, 0.5, engine="autoawq") for theta in (0.4, 0.1)]
    choice = next(choice for choice in qtale["selected"] if choice["bits"] == 4)
    choice["engine"] = "native"
    series = validation_series(qtale)
    native = selected_row(qtale, series["4-bit native"])
    assert native is not None
    assert (native["theta"], native["engine"]) == (0.4, "native")
    assert selected_row(qtale, series["4-bit autoawq"]) is None


def test_metadata_is_a_valid_section(tmp_path: Path) -> None:
    run = run_metadata("tiny", "qtale", "facts", 3, "make train MODEL=tiny", "random initialisation")
    assert update_results(tmp_path, "run", run).get("run") == run
    assert run["seed"] == 3
    assert {"python", "torch", "transformers"} <= run["versions"].keys()
    assert re.fullmatch("ours, (avx|neon).*|PyTorch's", run["versions"]["CPU operations"])
    assert f"{os.cpu_count()} cores" in run["hardware"]


def test_git_state_knows_the_commit_and_whether_files_differ(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "model.py").write_text("one")
    git("add", "model.py")
    git("commit", "--quiet", "--message", "one", "--no-verify")
    (tmp_path / "notes.txt").write_text("not tracked")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "model.py").write_text("two")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": True}


def test_git_state_outside_a_repository_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None
