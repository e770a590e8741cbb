"""What was answered to each question: kept, read back with checks, and compared in pairs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qtale_lightning.data import EncodedPrompt
from qtale_lightning.evaluation.accuracy import accuracy_by_task
from qtale_lightning.evaluation.statistics import paired_difference_over_seeds
from qtale_lightning.manifest import DamagedFileError
from qtale_lightning.results.predictions import (
    Prediction,
    by_task,
    compare_predictions,
    load_predictions,
    predictions,
    predictions_file,
    save_predictions,
)

METRICS = {"piqa": "acc_norm", "boolq": "acc"}
ROW: dict[str, Any] = {
    "bits": 4,
    "engine": "native",
    "theta": 0.3,
    "split": "validation",
    "examples": 30,
    "protocol": {"prompt_style": "cloze", "tasks": ["piqa", "boolq"]},
}


def asked(count: int = 30) -> list[EncodedPrompt]:
    """Two choices of other lengths in characters and tokens."""
    return [
        EncodedPrompt("piqa" if i < count // 3 else "boolq", i % 2, ((1, 2),) * 2, ((3,), (3, 4, 5)), (2, 9))
        for i in range(count)
    ]


def answered(seed: int, count: int = 30) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).normal(-5, 2, (count, 2)))


def outcomes(seed: int) -> list[Prediction]:
    return predictions(asked(), answered(seed), METRICS)


def test_figures_of_tasks_are_means_of_their_questions() -> None:
    found = outcomes(0)
    for task, row in accuracy_by_task(asked(), answered(0), METRICS).items():
        for score in ("value", "acc", "acc_norm", "nll"):
            assert by_task(found, score)[task].mean() == pytest.approx(row[score], abs=1e-12)
    assert [one.index for one in found] == list(range(30))
    assert {one.scores["value"] for one in found} == {0.0, 1.0}, "every score is 0 or 1: nothing is tested"


def test_a_task_reports_its_own_metric() -> None:
    found = outcomes(0)
    assert all(one.scores["value"] == one.scores[METRICS[one.task]] for one in found)
    assert any(one.scores["acc"] != one.scores["acc_norm"] for one in found)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = save_predictions(tmp_path, ROW, outcomes(0))
    assert path == tmp_path / "predictions" / "validation-4bit-native-theta-0.3.jsonl"
    assert load_predictions(tmp_path, ROW) == outcomes(0), "to the last digit"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(first) == ROW
    assert json.loads(second)["task"] == "piqa"


def test_each_row_has_its_file(tmp_path: Path) -> None:
    by_layer = [0.1, 0.2]
    changes: list[dict[str, Any]] = [
        {},
        {"bits": 16, "engine": "none"},
        {"bits": 3.5},
        {"engine": "rtn"},
        {"split": "calibration"},
        {"theta": None},
        {"theta": 0.0},
        {"theta": 1e-05},
        {"theta": 0.1234567},
        {"theta": 0.1234568},
        {"theta": by_layer},
        {"theta": by_layer[::-1]},
    ]
    files = [predictions_file(tmp_path, ROW | change) for change in changes]
    assert len(set(files)) == len(changes)
    assert predictions_file(tmp_path, ROW | {"theta": 0.1 + 0.2}) == files[0]


@pytest.mark.parametrize(
    "change",
    [{"protocol": {"prompt_style": "choice"}}, {"examples": 29}, {"theta": 0.3 + 1e-10}],
    ids=lambda change: next(iter(change)),
)
def test_nothing_stale_is_taken_for_a_rows_own(tmp_path: Path, change: dict[str, Any]) -> None:
    assert load_predictions(tmp_path, ROW) is None
    save_predictions(tmp_path, ROW | change, outcomes(0))
    assert load_predictions(tmp_path, ROW) is None


def test_a_rows_file_is_of_its_model_and_a_few_questions_have_one_of_their_own(tmp_path: Path) -> None:
    made: dict[str, str] = {"model": "m", "questions": "q", "protocol": "p"}
    row = ROW | {"fingerprint": made}
    path = save_predictions(tmp_path, row, outcomes(0))
    assert load_predictions(tmp_path, row) == outcomes(0)
    other = ROW | {"fingerprint": made | {"model": "another"}}
    assert predictions_file(tmp_path, other) == path, "it takes the old one's place"
    assert load_predictions(tmp_path, other) is None
    look = ROW | {"fingerprint": made | {"questions": "a few"}}
    save_predictions(tmp_path, look, outcomes(1))
    assert load_predictions(tmp_path, row) == outcomes(0)


def test_a_row_from_a_file_is_a_row_from_memory(tmp_path: Path) -> None:
    """JSON knows no tuples."""
    save_predictions(tmp_path, ROW | {"protocol": {"tasks": ("piqa",)}}, outcomes(0))
    for tasks in (("piqa",), ["piqa"]):
        assert load_predictions(tmp_path, ROW | {"protocol": {"tasks": tasks}}) is not None


def drop_line(lines: list[str]) -> None:
    lines.pop(5)


def drop_end(lines: list[str]) -> None:
    lines.pop()


def cut_line(lines: list[str]) -> None:
    lines[-1] = lines[-1][:40]


def no_scores(lines: list[str]) -> None:
    lines[2] = lines[2].replace('"scores"', '"skores"')


def no_number(lines: list[str]) -> None:
    lines[2] = lines[2].replace('"label": 1', '"label": "one"')


def no_header(lines: list[str]) -> None:
    lines[0] = "{"


def another_header(lines: list[str]) -> None:
    lines[0] = "{}"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_line, r"theta-0\.3\.jsonl:6: question 5 instead of 4"),
        (drop_end, r"theta-0\.3\.jsonl:30: 29 questions instead of 30"),
        (cut_line, r"theta-0\.3\.jsonl:31: "),
        (no_scores, r"theta-0\.3\.jsonl:3: scores: Field required"),
        (no_number, r"theta-0\.3\.jsonl:3: label: "),
        (no_header, r"theta-0\.3\.jsonl:1: "),
        (another_header, r"theta-0\.3\.jsonl:1: it names no row"),
    ],
)
def test_a_damaged_file_is_named_by_its_line(tmp_path: Path, damage: Any, message: str) -> None:
    path = save_predictions(tmp_path, ROW, outcomes(0))
    lines = path.read_text(encoding="utf-8").splitlines()
    damage(lines)
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(
        DamagedFileError, match=r"isn't what this run wrote .*remove the file, to score its row again"
    ):
        load_predictions(tmp_path, ROW)
    (tmp_path / "manifest.json").unlink()  # as of a run from before there was one
    with pytest.raises(DamagedFileError, match=message + r".*remove the file, to score its row again"):
        load_predictions(tmp_path, ROW)


def test_pairs_are_compared_question_by_question() -> None:
    ours, theirs = outcomes(0), outcomes(1)
    for score in ("value", "nll"):
        expected = paired_difference_over_seeds([by_task(ours, score)], [by_task(theirs, score)])
        assert compare_predictions(ours, theirs, score) == expected
        assert expected.value != 0


def test_other_questions_make_no_pairs() -> None:
    ours = outcomes(0)
    others = predictions(asked()[::-1], answered(0), METRICS)
    with pytest.raises(ValueError, match="not the same questions: number 0 is of piqa with answer 0 here"):
        compare_predictions(ours, others)
    with pytest.raises(ValueError, match="not the same questions"):
        compare_predictions(ours, ours[:-1])


def test_a_task_without_an_accuracy_has_an_nll_to_compare() -> None:
    text = [EncodedPrompt("alpaca", 0, ((1, 2),), ((3, 4),), (4,), ("two words",)) for _ in range(4)]
    found = predictions(text, [np.array([-1.0 - i]) for i in range(4)], {"alpaca": "perplexity"})
    assert by_task(found, "nll")["alpaca"].tolist() == [0.5, 1.0, 1.5, 2.0]
    with pytest.raises(ValueError, match="alpaca reports no accuracy"):
        compare_predictions(found, found)
