"""The suite generality at tiny size, from training to the report: what is measured, written, and kept."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtale_lightning.__main__ import main
from qtale_lightning.results.predictions import predictions_file
from qtale_lightning.results.store import load_results
from qtale_lightning.stages.writing import FOLDER

pytestmark = pytest.mark.slow

Options = Callable[..., list[str]]


@pytest.fixture(scope="module")
def run(generality: Path, options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, one precision below 16 bits and two θ."""
    out = tmp_path_factory.mktemp("out")
    main(
        [
            "fit",
            *options("tiny", "qtale", "--data.tasks", "generality", "--data.root", str(generality)),
            *("--data.shots", "2", "--data.max_length", "1024", "--data.max_new_tokens", "5"),
            *("--data.generations", "2", "--data.batch_size", "8", "--data.calibration_rows", "6"),
            *("--trainer.max_steps", "2", "--validations", "1", "--model.router_lr", "3e-2"),
            *("--quantize.engine", "rtn", "--quantize.bits", "[4]", "--sweep.thresholds", "[0.5,0]"),
            *("--out", str(out), "--wandb", "disabled"),
        ]
    )
    return out / "tiny-qtale-generality-s0"


def validation(run: Path) -> list[dict[str, Any]]:
    return [dict(row) for row in load_results(run)["evaluation"] if row["split"] == "validation"]


def written(run: Path, name: str) -> list[dict[str, Any]]:
    (file,) = (run / FOLDER).glob(f"{name}*.jsonl")
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_each_task_is_measured_by_its_metric(run: Path) -> None:
    rows = validation(run)
    assert [(row["bits"], row["theta"]) for row in rows] == [(16, 0.5), (16, 0.0), (4, 0.5), (4, 0.0)]
    for row in rows:
        tasks = row["accuracy"]
        assert {task: score["metric"] for task, score in tasks.items()} == {
            "mmlu": "acc",
            "alpaca": "perplexity",
            "samsum": "rougeL",
        }
        assert set(tasks["mmlu"]["subjects"]) == {"anatomy", "virology"}
        assert tasks["alpaca"]["value"] == pytest.approx(math.exp(tasks["alpaca"]["nll"]))
        assert {"rouge1", "rouge2", "rougeL", "perplexity"} <= set(tasks["samsum"])
        assert row["average"] is None
        assert row["no_average"].startswith("alpaca reports perplexity, samsum reports rougeL")
        nlls = [score["nll"] for score in tasks.values()]
        assert row["average_nll"] == pytest.approx(sum(nlls) / 3)
        assert row["writing_seconds"] > 0


def test_the_protocol_says_how_tasks_were_asked_and_answered(run: Path) -> None:
    for row in validation(run):
        protocol = row["protocol"]
        assert (protocol["shots"], protocol["choice_labels"], protocol["answers"]) == (2, "letters", "scored")
        assert set(protocol["templates"]) == {"mmlu", "alpaca", "samsum"}
        assert protocol["generation"]["max_new_tokens"] == {"alpaca": 5, "samsum": 5}
        assert protocol["generation"]["answers"] == {"alpaca": 2, "samsum": 6}
        assert protocol["generation"]["decoding"] == "greedy"


def test_theta_is_selected_by_nll_without_writing(run: Path) -> None:
    """The rule is the lowest execution ratio within one standard error of the best nll."""
    results = load_results(run)
    for choice in results["selected"]:
        rows = [
            row
            for row in results["evaluation"]
            if (row["split"], row["bits"]) == ("calibration", choice["bits"])
        ]
        assert all(row["accuracy"]["samsum"]["metric"] == "perplexity" for row in rows)
        assert not any("writing_seconds" in row for row in rows)
        best = min(rows, key=lambda row: row["average_nll"])
        good = [row for row in rows if row["average_nll"] <= best["average_nll"] + best["average_nll_stderr"]]
        assert choice["theta"] == min(good, key=lambda row: row["execution_ratio"])["theta"]
        assert choice["average"] is None
    assert not list((run / FOLDER).glob("calibration*"))


def test_what_was_written_is_kept(run: Path) -> None:
    names = [f"validation-{part}" for part in ("16bit-none-theta-0.5", "4bit-rtn-theta-0.0")]
    for name in names:
        lines = written(run, name)
        assert [line["task"] for line in lines] == ["alpaca"] * 2 + ["samsum"] * 6
        for line in lines:
            number = line["prompt"].split("number " if line["task"] == "alpaca" else "Ann: ")[1][:2]
            assert number in line["reference"]
            assert line["prompt"].endswith(("### Response:\n", "Summary:\n"))
            assert isinstance(line["generated"], str)
            assert "read" not in line
    assert len(list((run / FOLDER).glob("*.jsonl"))) == 4


def test_the_page_shows_each_measure_and_which_is_better_when_lower(run: Path) -> None:
    page = (run / "results.md").read_text(encoding="utf-8")
    for words in ("MMLU %", "Alpaca perplexity ↓", "SAMSum ROUGE-1 / 2 / L %", "no average: alpaca reports"):
        assert words in page
    perplexity = validation(run)[0]["accuracy"]["alpaca"]
    assert f"| {perplexity['value']:.3f} ± {perplexity['stderr']:.3f} |" in page
    assert "nan" not in page.lower().replace("finance", "")
    assert (run / "plots" / "accuracy.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("asked", "shown"),
    [(["--data.tasks", "mmlu"], True), (["--data.tasks", "facts", "--data.root", "null"], False)],
)
def test_choices_answered_in_writing(run: Path, tmp_path: Path, asked: list[str], shown: bool) -> None:
    """Accuracy of what is read, the share that can't be, and the same questions by log-likelihood beside it.

    What is read is a label where the prompt shows the choices, else one's text.
    """
    run = shutil.copytree(run, tmp_path / "run")  # a row of the same θ is replaced
    few = ["--data.limit_validation", "6", "--data.max_new_tokens", "3"]
    main(["evaluate", str(run), *asked, "--data.answers", "generated", *few])
    (found,) = [row for row in validation(run) if row["protocol"]["answers"] == "generated"]
    (score,) = found["accuracy"].values()
    assert score["metric"] == "acc_generated"
    assert found["average"] == score["value"]
    lines = written(run, predictions_file(run, found).stem)
    assert len(lines) == score["examples"] == 6
    assert score["unreadable"] == sum(line["read"] is None for line in lines) / 6
    assert score["value"] == sum(line["read"] == line["reference"] for line in lines) / 6
    assert all((line["reference"] in "ABCD") == shown for line in lines)
    assert "reading" in found["protocol"]["generation"]
