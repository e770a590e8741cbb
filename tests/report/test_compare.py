"""Several runs in one table and figure."""

import copy
from pathlib import Path

import pytest

from qtale_lightning.report.compare import compare, comparison_markdown, plot_comparison
from qtale_lightning.results.schema import Results
from qtale_lightning.results.store import save_results


def two_runs(results: Results) -> list[Results]:
    other = copy.deepcopy(results)
    other["run"]["method"] = "dllm"
    for row in other["evaluation"]:
        row["average"] -= 0.05
    return [results, other]


def test_table_has_every_row_of_every_run(qtale: Results) -> None:
    runs = two_runs(qtale)
    page = comparison_markdown(runs)
    for run in runs:
        assert run["run"]["command"] in page
        for row in run["evaluation"]:
            if row["split"] == "validation":
                line = [f"| {run['run']['method']} | {row['theta']:g} |", f"{100 * row['average']:.1f} ± "]
                assert any(all(part in text for part in line) for text in page.splitlines())


def test_engines_have_columns_of_their_own(qtale: Results) -> None:
    """At the same bits and θ they are several models: none takes another's place, in no run."""
    one, other = two_runs(qtale)
    (row,) = (r for r in one["evaluation"] if (r["bits"], r["theta"], r["split"]) == (4, 0.5, "validation"))
    one["evaluation"].append({**row, "engine": "gptq", "average": 0.1234})
    page = comparison_markdown([one, other])
    header = page.splitlines()[0]
    assert "4-bit gptq" in header
    assert f"4-bit {row['engine']}" in header
    assert f"{100 * row['average']:.1f} ±" in page
    assert "12.3 ±" in page
    assert page.count("12.3 ±") == 1
    assert len(plot_comparison([one, other]).axes) == 2 * (header.count("-bit"))


def test_what_runs_differ_in_is_said(qtale: Results) -> None:
    one, other = two_runs(qtale)
    assert "different" not in comparison_markdown([one, other])
    other["train"] |= {"steps": 750, "examples": 12000}
    other["run"]["seed"] = 3
    page = comparison_markdown([one, other])
    assert (
        "- different lengths of training: qtale 1,500 steps, 24,000 examples; dllm 750 steps, 12,000 examples\n"
        in page
    )
    assert "- different seeds: qtale 0; dllm 3\n" in page
    assert "hardware" not in page


def test_figure_has_a_column_per_precision_and_a_line_per_run(qtale: Results) -> None:
    runs = two_runs(qtale)
    precisions = {row["bits"] for row in qtale["evaluation"] if row["split"] == "validation"}
    figure = plot_comparison(runs)
    assert len(figure.axes) == 2 * len(precisions)
    for axes in figure.axes:
        assert len(axes.containers) == len(runs)


@pytest.mark.slow
def test_files_are_written_and_other_protocols_refused(tmp_path: Path, qtale: Results) -> None:
    one, other = two_runs(qtale)
    for name, run in (("a", one), ("b", other)):
        save_results(tmp_path / name, run)
    page = compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert page.read_text(encoding="utf-8") == comparison_markdown([one, other])
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 10_000
    for row in other["evaluation"]:
        row["protocol"] = {**row["protocol"], "prompt_style": "choice"}
    save_results(tmp_path / "b", other)
    with pytest.raises(ValueError, match="protocols differ"):
        compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(ValueError, match="at least two"):
        compare([tmp_path / "a"], tmp_path / "out")
