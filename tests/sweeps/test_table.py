"""The sweep's table and figure, from the records of its runs."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qtale_lightning.results.schema import Results
from qtale_lightning.results.store import load_results, save_results
from qtale_lightning.sweeps.figure import plot_parallel
from qtale_lightning.sweeps.outcome import outcome
from qtale_lightning.sweeps.table import records, sweep_frame, write_table


def measured(bits: float, nll: float, **more: Any) -> dict[str, Any]:
    row = {"bits": bits, "engine": "native", "theta": 0.3, "execution_ratio": 0.8, "flops_ratio": 0.81}
    row |= {"average": 0.5, "average_stderr": 0.01, "average_nll": nll, "average_nll_stderr": 0.02}
    return row | {"weight_bytes": 10**8, "seconds": 3.0} | more


def keep(
    folder: Path, parameters: dict[str, str], rows: list[dict[str, Any]], status: str = "finished"
) -> None:
    name = ",".join(f"{key}={value}" for key, value in parameters.items())
    record = {"parameters": parameters, "command": f"python … {name}", "run": None, "status": status}
    (folder / name).mkdir(parents=True)
    text = json.dumps(record | {"seconds": 1.0, "outcome": rows})
    (folder / name / "trial.json").write_text(text, encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for weight, nll in (("10", 3.1), ("0.5", 3.3), ("2", 3.2)):
        keep(tmp_path, {"model.lambda_entropy": weight}, [measured(4, nll), measured(3, nll + 0.4)])
    keep(tmp_path, {"model.lambda_entropy": "7"}, [], "failed (2)")
    return tmp_path


def test_a_row_for_each_run_and_precision_in_order_of_the_parameters(folder: Path) -> None:
    page = write_table(folder, "lambda2").read_text(encoding="utf-8")
    assert "3 runs finished; 1 not." in page
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "|" in line
    ][2:]
    assert [row[:2] for row in rows] == [[w, b] for w in ("0.5", "2", "10") for b in ("4", "3")]
    assert "3.700 ± 0.020" in rows[1]
    assert "50.00 ± 1.00" in rows[1]
    assert "- model.lambda_entropy=7: failed (2)\n  `python … model.lambda_entropy=7`" in page


def test_the_csv_holds_exact_figures_and_commands(folder: Path) -> None:
    write_table(folder, "lambda2")
    frame = pd.read_csv(folder / "sweep.csv")
    assert len(frame) == 6
    row = frame[(frame["model.lambda_entropy"] == 2) & (frame["measured.bits"] == 3)].iloc[0]
    assert row["measured.average_nll"] == pytest.approx(3.6)
    assert row["command"] == "python … model.lambda_entropy=2"


def test_what_parameters_say_isnt_said_twice(tmp_path: Path) -> None:
    for theta in ("0.5", "0.1"):
        keep(tmp_path, {"bits": "3", "theta": theta}, [measured(3, 3.0, theta=float(theta))])
    header = write_table(tmp_path, "thresholds").read_text(encoding="utf-8").split("| ---")[0]
    assert header.count("bits") == 1
    assert "θ |" not in header


def test_a_sweep_without_runs_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no runs of a sweep"):
        write_table(tmp_path, "x")


def test_the_figure_has_an_axis_for_what_differs(folder: Path) -> None:
    frame = sweep_frame(records(folder))
    figure = plot_parallel(frame, ["model.lambda_entropy"])
    titles = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert titles == ["lambda_entropy", "bits", "nll"]  # the others agree in all runs
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
    assert len(lines) == 6
    best = lines[-1].get_ydata()  # drawn last: λ2 = 10 at 4 bits
    assert list(best) == [1.0, 1.0, 0.0]
    for kind in ("png", "pdf"):
        write_table(folder, "x")
        assert (folder / f"sweep.{kind}").stat().st_size > 2000


def test_numbers_of_many_sizes_are_on_a_logarithmic_axis() -> None:
    weights = [0.01 * 1.5**i for i in range(14)]
    rows = [
        {"a.weight": str(weight), **{f"measured.{k}": v for k, v in measured(4, 3 + i / 10).items()}}
        for i, weight in enumerate(weights)
    ]
    figure = plot_parallel(pd.DataFrame(rows), ["a.weight"])
    assert figure.axes[0].get_xticklabels()[0].get_text() == "weight (log)"
    heights = sorted(line.get_ydata()[0] for line in figure.axes[0].lines if len(line.get_xdata()) == 2)
    # Equal factors are equal steps; the drawn axes' own lines have two points as well.
    heights = sorted({round(height, 9) for height in heights})
    assert heights == pytest.approx([i / 13 for i in range(14)], abs=1e-6)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two precisions at two θ, of which the lower is selected."""
    protocol: dict[str, Any] = {}
    task = {
        "value": 0.5,
        "stderr": 0.1,
        "metric": "acc",
        "nll": 3.0,
        "acc": 0.5,
        "acc_norm": 0.5,
        "examples": 8,
    }
    rows = [
        {
            **measured(bits, 3.0 + theta, theta=theta, engine=engine),
            "split": "validation",
            "examples": 8,
            "accuracy": {"facts": task},
            "execution_ratio_per_layer": [0.8],
            "protocol": protocol,
        }
        for bits, engine in ((16, "none"), (4, "native"), (4, "rtn"))
        for theta in (0.5, 0.3)
    ]
    chosen = [
        {key: row[key] for key in ("bits", "engine", "theta", "average", "average_stderr")}
        | {"average_nll": row["average_nll"], "execution_ratio": 0.8, "rule": "x"}
        for row in rows
        if row["theta"] == 0.3
    ]
    results: Results = {"schema": 1, "evaluation": rows, "selected": chosen}  # type: ignore[typeddict-item]
    save_results(tmp_path, results)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["fit", "--quantize.bits", "[4]"], [(16, "none", 0.3), (4, "native", 0.3), (4, "rtn", 0.3)]),
        (["evaluate", "RUN", "--bits=4", "--theta=0.5"], [(4, "native", 0.5), (4, "rtn", 0.5)]),
        (["evaluate", "RUN", "--theta", "0.5"], [(16, "none", 0.5)]),
        (["thresholds", "RUN", "--quantize.bits=[4]", "--quantize.engine=rtn"], [(4, "rtn", 0.3)]),
        (["evaluate", "RUN", "--bits=16", "--bits=4", "--theta=0.9"], []),
    ],
    ids=lambda value: " ".join(value) if value and isinstance(value[0], str) else "",
)
def test_what_a_command_measured(run: Path, command: list[str], expected: list[tuple[Any, ...]]) -> None:
    rows = [(row["bits"], row["engine"], row["theta"]) for row in outcome(run, command)]
    assert sorted(rows, key=str) == sorted(expected, key=str)


def test_a_command_that_perturbs_measured_those_rows(run: Path) -> None:
    results = load_results(run)
    noisy = {**results["evaluation"][0], "average_nll": 9.0, "protocol": {"perturbation": {"noise": 1.0}}}
    save_results(run, {**results, "evaluation": [*results["evaluation"], noisy]})  # type: ignore[typeddict-item]
    plain = ["evaluate", "RUN", "--theta=0.5"]
    assert [row["average_nll"] for row in outcome(run, [*plain, "--noise=1"])] == [9.0]
    assert [row["average_nll"] for row in outcome(run, plain)] == [3.5]
    assert outcome(run, [*plain, "--noise", "2"]) == []
