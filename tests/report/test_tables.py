"""The tables and the page: their figures against figures computed here from the raw rows."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from qtale_lightning.report import markdown, print_summary, write_markdown, write_report
from qtale_lightning.report.notes import cost_notes, noise_notes
from qtale_lightning.report.tables import evaluation_frame, page
from qtale_lightning.results import Results, save_results
from qtale_lightning.results.schema import Evaluation

Row = Callable[..., Evaluation]


def printed(results: Results, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_summary(results, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def pair(row: Row, selected: float, argmax: float, stderr: float, nll_stderr: float = 0.01) -> Results:
    """A 4-bit run of two θ, 0.3 (selected) and 0.5, with these averages and errors."""
    changes = {"average_stderr": stderr, "average_nll_stderr": nll_stderr}
    rows = [row(4, 0.5, argmax, **changes), row(4, 0.3, selected, **changes)]
    choice = {"bits": 4, "theta": 0.3, "rule": "best on calibration", "average": selected}
    rest = {"average_stderr": stderr, "average_nll": 1.0, "execution_ratio": 0.8}
    return {"schema": 1, "evaluation": rows, "selected": [{**choice, **rest}]}  # type: ignore[typeddict-item]


def test_frame_has_a_row_per_precision_and_theta_in_percent(qtale: Results) -> None:
    frame = evaluation_frame(qtale)
    assert len(frame) == 24
    assert list(frame.columns[:6]) == ["bits", "engine", "theta", "execution_ratio", "flops_ratio", "piqa"]
    row = next(row for row in qtale["evaluation"] if (row["bits"], row["theta"]) == (3, 0.2))
    entry = frame[(frame.bits == 3) & (frame.theta == 0.2)].iloc[0]
    np.testing.assert_allclose(entry.average, 100 * row["average"])
    np.testing.assert_allclose(entry.average_stderr, 100 * row["average_stderr"])
    np.testing.assert_allclose(entry.arc_easy, 100 * row["accuracy"]["arc_easy"]["value"])
    np.testing.assert_allclose(entry.weight_mb, row["weight_bytes"] / 1e6)
    assert (entry.nll, entry.seconds) == (row["average_nll"], row["seconds"])
    assert sorted(zip(frame.bits[frame.selected], frame.theta[frame.selected], strict=True)) == [
        (3, 0.2),
        (4, 0.4),
        (16, 0.5),
    ]


def test_frame_leaves_calibration_rows_out_and_shows_full_runs(full: Results, row: Row) -> None:
    full["evaluation"].append(row(4, None, 0.9, split="calibration"))
    frame = evaluation_frame(full)
    assert list(frame.bits) == [16, 4, 3]
    assert frame.theta.isna().all()


def test_page_holds_every_row_with_its_errors(qtale: Results) -> None:
    lines = page(qtale).splitlines()
    for row in qtale["evaluation"]:
        start = f"| {row['bits']}-bit | {row['theta']:g} | {row['execution_ratio']:.3f} |"
        found = [line for line in lines if line.startswith(start)]
        piqa = row["accuracy"]["piqa"]
        tasks = f"{piqa['value'] * 100:.2f} ± {piqa['stderr'] * 100:.2f}"
        average = f"{row['average'] * 100:.2f} ± {row['average_stderr'] * 100:.2f}"
        nll = f"{row['average_nll']:.3f} ± {row['average_nll_stderr']:.3f}"
        assert any(tasks in line and average in line and nll in line for line in found), start


def test_page_says_what_ran_and_how_it_was_scored(qtale: Results) -> None:
    text = page(qtale)
    assert text.startswith("# smollm2-135m · qtale · csqa · seed 0\n")
    assert "`make train MODEL=smollm2-135m METHOD=qtale DATA=csqa`" in text
    assert "| commit | 0123456789abcdef0123456789abcdef01234567 |" in text
    assert "AMD EPYC 7763, 8 cores; no GPU" in text
    assert "- prompt_style: cloze" in text
    assert "- ARC-e reports: acc_norm on 570 questions" in text
    assert "| decisions flipped by Gumbel noise | 8.34 % |" in text
    assert "Rule: 16-bit, 4-bit, 3-bit: lowest execution ratio within one standard error" in text
    assert "uncommitted" not in text
    qtale["run"]["git"] = {"commit": "abc", "dirty": True}
    assert "| commit | abc (with uncommitted changes) |" in page(qtale)


def test_selected_and_best_rows_are_marked(qtale: Results) -> None:
    rows = [line.split("|") for line in page(qtale).splitlines() if re.match(r"\| (16|4|3)-bit", line)]
    marks = {(cells[1].strip(), cells[2].strip()): cells[-2].strip() for cells in rows if len(cells) > 12}
    assert {key: mark for key, mark in marks.items() if mark} == {
        ("16-bit", "0.5"): "selected",
        ("16-bit", "0"): "best",
        ("4-bit", "0.4"): "selected",
        ("4-bit", "0"): "best",
        ("3-bit", "0.2"): "selected",
        ("3-bit", "0"): "best",
    }


# Two rows with error 0.01 differ with error 0.01 · √2, which is 1.414 points; twice that is 2.828 points.
@pytest.mark.parametrize(
    ("selected", "verdict"),
    [(0.5282, "within noise"), (0.5284, "beyond noise"), (0.4718, "within noise"), (0.4716, "beyond noise")],
)
def test_noise_is_judged_by_two_errors_of_the_difference(row: Row, selected: float, verdict: str) -> None:
    (note,) = [note for note in noise_notes(pair(row, selected, 0.5, 0.01)) if "against" in note]
    accuracy, nll = note.split(";")
    assert f"{100 * (selected - 0.5):+.2f} points (standard error 1.41), {verdict}" in accuracy
    # The nll moves by as much, with the same errors, in the other direction.
    assert f"{0.5 - selected:+.4f} (standard error 0.0141), {verdict}" in nll


def test_accuracy_and_nll_are_judged_apart(row: Row) -> None:
    (note,) = [note for note in noise_notes(pair(row, 0.51, 0.5, 0.01, 0.001)) if "against" in note]
    accuracy, nll = note.split(";")
    assert accuracy.endswith("within noise")
    assert nll.endswith("beyond noise.")


def test_notes_name_what_they_compare(qtale: Results, row: Row) -> None:
    notes = noise_notes(qtale)
    assert notes[0] == "16-bit, selected θ = 0.5 is D-LLM's decision (θ = 0.5)."
    assert notes[1].startswith("16-bit, selected θ = 0.5 against the best row (θ = 0): accuracy -0.75 points")
    assert notes[-1].startswith("3-bit, θ = 0.2 against 16-bit, θ = 0.5: accuracy -2.80 points")
    assert len(notes) == 8
    best_selected = noise_notes(pair(row, 0.6, 0.5, 0.01))
    assert best_selected[-1] == "4-bit, selected θ = 0.3 is the best row (θ = 0.3)."
    argmax_best = noise_notes(pair(row, 0.5, 0.6, 0.01))
    assert len(argmax_best) == 1
    assert "against the likelier decision (θ = 0.5), the best row: accuracy -10.00" in argmax_best[0]


def test_full_runs_compare_precisions_only(full: Results) -> None:
    notes = noise_notes(full)
    assert [note.split(":")[0] for note in notes] == ["4-bit against 16-bit", "3-bit against 16-bit"]
    assert "-5.70 points" in notes[1]
    text = page(full)
    assert "Selected threshold" not in text
    assert "selected" not in text
    assert "routing entropy" not in text


def test_counted_and_measured_cost_are_told_apart(qtale: Results) -> None:
    note = cost_notes(qtale)[1]
    assert note.startswith(
        "4-bit: 0.712 of the base model's FLOPs, counted; 82.0 s, measured (100.0 s at θ = 0"
    )
    assert "Counted FLOPs and measured seconds are different things" in page(qtale)


def test_rows_scored_differently_stand_apart(qtale: Results) -> None:
    """Rows of a quick look, or asked otherwise, are neither in the table nor in the protocol, nor left out."""
    assert "Other questions" not in page(qtale)
    qtale["evaluation"][0]["protocol"] = {"prompt_style": "choice"}
    qtale["evaluation"][1]["examples"] = 100
    text = page(qtale)
    assert "prompt_style: cloze" in text
    own, others = text.split("## Other questions than the run's own")
    assert "| 9,698 | 16-bit | 0.9 |" in others
    assert "| 100 | 16-bit | 0.7 |" in others
    assert "| 16-bit | 0.9 |" not in own
    assert "| 16-bit | 0.7 |" not in own


def test_a_run_that_has_only_trained_is_reported(tmp_path: Path, qtale: Results) -> None:
    qtale["evaluation"], qtale["selected"] = [], []
    text = page(qtale)
    assert "## Training" in text
    assert "Evaluation" not in text
    assert "1,987,654" in printed(qtale, 80)


def test_markdown_table_aligns_figures_and_escapes_bars() -> None:
    table = markdown.table(["what", "NLL"], [["a|b", "1.0"]])
    assert table == "| what | NLL |\n| --- | ---: |\n| a\\|b | 1.0 |"


def test_summary_fits_a_log_file(qtale: Results, full: Results) -> None:
    for results in (qtale, full):
        text = printed(results, 80)
        assert "…" not in text
        for row in results["evaluation"]:
            assert f"{100 * row['average']:.2f} ± {100 * row['average_stderr']:.2f}" in text
            assert f"{row['average_nll']:.3f}" in text
        assert "within noise" in text


def test_summary_prints_brackets_as_they_are(qtale: Results) -> None:
    qtale["run"]["command"] = "fit --bits [4,3] [bold]"
    assert "[4,3] [bold]" in printed(qtale, 120)


def test_page_embeds_the_plots_that_are_there(tmp_path: Path, qtale: Results) -> None:
    save_results(tmp_path, qtale)
    assert "plots/" not in write_markdown(tmp_path).read_text("utf-8")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "layers.png").write_bytes(b"")
    text = write_markdown(tmp_path).read_text("utf-8")
    assert re.findall(r"\]\((.*?)\)", text) == ["plots/layers.png"]


@pytest.mark.slow
def test_report_writes_everything_and_prints_the_summary(
    tmp_path: Path, qtale: Results, metrics_csv: Path
) -> None:
    assert metrics_csv.parent == tmp_path
    save_results(tmp_path, qtale)
    console = Console(file=io.StringIO(), width=100)
    assert write_report(tmp_path, console) == qtale
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    plots = [f"plots/{name}.{kind}" for name in ("accuracy", "layers", "losses") for kind in ("pdf", "png")]
    assert written == sorted(["manifest.json", "metrics.csv", "results.json", "results.md", *plots])
    text = (tmp_path / "results.md").read_text("utf-8")
    assert re.findall(r"\]\((.*?)\)", text) == [plot for plot in plots if plot.endswith("png")]
    assert isinstance(console.file, io.StringIO)
    assert "Selected threshold" in console.file.getvalue()
    assert console.file.getvalue().endswith(f"{tmp_path}/results.md\n"), "where all of it is, in one line"


def test_the_decision_at_half_is_named_by_the_method(qtale: Results) -> None:
    for method, name in (
        ("mod", "MoD's decision"),
        ("dllm", "D-LLM's decision"),
        ("other", "the likelier decision"),
    ):
        qtale["run"]["method"] = method
        assert noise_notes(qtale)[0] == f"16-bit, selected θ = 0.5 is {name} (θ = 0.5)."


@pytest.mark.slow
def test_thresholds_by_layer_are_shown_by_their_range(tmp_path: Path, qtale: Results, row: Row) -> None:
    """In every table, in the figures, and as no number in the frame."""
    theta = [0.05, 0.3123, 0.612]
    qtale["evaluation"].append({**row(4, 0.3, 0.6), "theta": theta})
    choice = next(choice for choice in qtale["selected"] if choice["bits"] == 4)
    choice.update({"theta": theta, "budget": 0.7, "passes": 61, "seconds": 123.4})
    choice["rule"] = "layer-budget: a θ for each layer"
    save_results(tmp_path, qtale)
    console = Console(file=io.StringIO(), width=100)
    write_report(tmp_path, console)
    page = (tmp_path / "results.md").read_text(encoding="utf-8")
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for text in (page, printed):
        assert text.count("0.05…0.61 by layer") >= 3  # selected, its cost, all rows
    assert "| 4-bit | layer-budget 0.7 | 0.05…0.61 by layer | 61 | 123.4 |" in page
    frame = evaluation_frame(qtale)
    assert frame["theta"].isna().sum() == 1
    assert frame[frame["theta"].isna()]["average"].tolist() == [60.0]
