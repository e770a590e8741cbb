"""Tasks that report other things than accuracies: what is accepted, refused, and shown of them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtale_lightning.report.compare import compare
from qtale_lightning.report.figures import plot_accuracy
from qtale_lightning.report.notes import noise_notes, protocol_lines
from qtale_lightning.report.scores import score_header, score_text
from qtale_lightning.report.tables import evaluation_frame, evaluation_table, page
from qtale_lightning.results import Results, save_results, validate
from qtale_lightning.results.schema import Evaluation
from qtale_lightning.results.series import best_row

Row = Callable[..., Evaluation]

MMLU: dict[str, Any] = {
    "value": 0.25,
    "stderr": 0.05,
    "metric": "acc_generated",
    "nll": 1.4,
    "nll_stderr": 0.1,
    "acc": 0.5,
    "acc_norm": 0.5,
    "unreadable": 0.125,
    "subjects": {"anatomy": {"value": 0.25, "stderr": 0.05, "examples": 40}},
    "examples": 40,
}
ALPACA: dict[str, Any] = {
    "value": 7.389,
    "stderr": 0.5,
    "metric": "perplexity",
    "nll": 2.0,
    "nll_stderr": 0.07,
    "perplexity": 7.389,
    "perplexity_stderr": 0.5,
    "tokens": 900,
    "examples": 10,
}
SAMSUM: dict[str, Any] = {
    **ALPACA,
    "value": 0.3,
    "stderr": 0.02,
    "metric": "rougeL",
    "rouge1": 0.4,
    "rouge1_stderr": 0.02,
    "rouge2": 0.15,
    "rouge2_stderr": 0.02,
    "rougeL": 0.3,
    "rougeL_stderr": 0.02,
}


@pytest.fixture
def mixed(qtale: Results, row: Row) -> Results:
    """Two precisions × two θ of the suite generality; the nll is best at θ = 0.3."""
    evaluation = []
    for bits in (16, 4):
        for theta, nll in ((0.5, 2.5), (0.3, 2.4)):
            scores = {"mmlu": MMLU, "alpaca": ALPACA, "samsum": SAMSUM}
            changes = {"average": None, "average_stderr": None, "no_average": "alpaca reports perplexity"}
            given = row(bits, theta, 0.5, accuracy=copy.deepcopy(scores), average_nll=nll)
            evaluation.append({**given, **changes})
    qtale["evaluation"] = evaluation
    qtale["selected"] = [
        {**choice, "theta": 0.3, "average": None, "average_stderr": None} for choice in qtale["selected"][:2]
    ]
    return qtale


def set_score(task: str, **changes: Any) -> Callable[[Any], None]:
    return lambda results: results["evaluation"][1]["accuracy"][task].update(changes)


def drop(task: str, key: str) -> Callable[[Any], None]:
    return lambda results: results["evaluation"][1]["accuracy"][task].pop(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_score("mmlu", value=1.5), r"evaluation\.1\.accuracy\.mmlu\.value: .*less than or equal to 1"),
        (set_score("mmlu", unreadable=-0.1), r"accuracy\.mmlu\.unreadable: .*greater than or equal to 0"),
        (set_score("alpaca", value=float("inf")), r"accuracy\.alpaca\.value: .*finite"),
        (set_score("alpaca", metric="bleu"), r"evaluation\.1\.accuracy\.alpaca: .*'bleu'"),
        (set_score("samsum", rouge1=40.0), r"accuracy\.samsum\.rouge1: .*less than or equal to 1"),
        (drop("mmlu", "acc"), r"evaluation\.1\.accuracy\.mmlu\.acc: is missing"),
        (drop("alpaca", "tokens"), r"accuracy\.alpaca\.tokens: is missing"),
    ],
)
def test_scores_are_checked_by_their_metric(
    mixed: Results, damage: Callable[[Any], None], message: str
) -> None:
    assert validate(mixed) is mixed
    damage(mixed)
    with pytest.raises(ValueError, match=message):
        validate(mixed)


def test_a_perplexity_is_no_percentage_and_the_lower_the_better() -> None:
    assert score_text(ALPACA) == "7.389 ± 0.500"  # type: ignore[arg-type]
    assert score_text(MMLU) == "25.00 ± 5.00"  # type: ignore[arg-type]
    assert score_text(SAMSUM) == "40.00 / 15.00 / 30.00 ± 2.00"  # type: ignore[arg-type]
    headers = [score_header("X", metric) for metric in ("acc", "acc_generated", "perplexity", "rougeL")]
    assert headers == ["X %", "X %", "X perplexity ↓", "X ROUGE-1 / 2 / L %"]


def test_without_an_average_the_nll_says_which_row_is_best(mixed: Results, row: Row) -> None:
    assert best_row(mixed["evaluation"][:2])["theta"] == 0.3
    averaged = [row(16, 0.5, 0.6, average_nll=3.0), row(16, 0.3, 0.5, average_nll=1.0)]
    assert best_row(averaged)["theta"] == 0.5


@pytest.mark.parametrize("brief", [False, True])
def test_tables_show_every_task_where_there_is_no_average(mixed: Results, brief: bool) -> None:
    table = evaluation_table(mixed, brief)
    start = table.headers.index("MMLU %")
    assert table.headers[start : start + 5] == [
        "MMLU %",
        "MMLU unreadable %",
        "Alpaca perplexity ↓",
        "SAMSum ROUGE-1 / 2 / L %",
        "average %",
    ]
    for cells in table.rows:
        expected = ["25.00 ± 5.00", "12.50", "7.389 ± 0.500", "40.00 / 15.00 / 30.00 ± 2.00", "–"]
        assert cells[start : start + 5] == expected
    assert [cells[-1] for cells in table.rows] == ["", "selected and best"] * 2


def test_a_frame_has_percent_and_perplexities(mixed: Results) -> None:
    frame = evaluation_frame(mixed)
    assert frame["alpaca"].tolist() == [7.389] * 4
    assert frame["mmlu"].tolist() == [25.0] * 4
    assert frame["average"].isna().all()


def test_the_page_says_why_there_is_no_average(mixed: Results) -> None:
    assert "no average: alpaca reports perplexity" in protocol_lines(mixed)
    assert any("NLL -0.1000" in note for note in noise_notes(mixed))
    assert not any("accuracy" in note for note in noise_notes(mixed))
    assert "nan" not in page(mixed)


def test_figures_show_the_nll_alone(mixed: Results, qtale: Results) -> None:
    labels = [axes.get_ylabel() for axes in plot_accuracy(mixed).axes]
    assert labels == ["average nll, nats"]


def test_comparisons_show_every_task(mixed: Results, tmp_path: Path) -> None:
    for name in ("one", "other"):
        save_results(tmp_path / name, mixed)
    page = compare([tmp_path / "one", tmp_path / "other"], tmp_path / "out").read_text(encoding="utf-8")
    assert "25.00 ± 5.00 / 7.389 ± 0.500 / 40.00 / 15.00 / 30.00 ± 2.00 / 2.500 ± 0.008" in page
    assert "MMLU % / Alpaca perplexity ↓ / SAMSum ROUGE-1 / 2 / L % / nll of the gold answers" in page
