"""Every benchmark runs at its quick size and writes what it measured; what is missing is said, not failed upon."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtale_lightning.__main__ import main

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = sorted(file.stem for file in BENCHMARKS.glob("*.py") if file.stem != "common")
# Arguments that keep a quick run quick: AutoAWQ alone takes longer than all others together, and other widths are
# other numbers of the same path.
MORE = {"quantize": ["--bits", "4", "3.5", "--autoawq-bits", "--fewer-steps", "2"]}
NOT_QUICK = {"calibration", "plot_latency", "runs"}  # what they need is made by their own tests

Bench = Callable[..., Path]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    """``bench(name, *arguments)``: a script's command line, run in this process; where its JSON should be."""

    def run(name: str, *arguments: str) -> Path:
        target = tmp_path / f"{name}.json"
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        monkeypatch.delenv("QTALE_DATA", raising=False)  # a benchmark on real rows would run in full
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--json", str(target)])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        return target

    return run


def measured(target: Path, name: str) -> dict[str, Any]:
    """The content of a benchmark's JSON, its schema checked."""
    content = json.loads(target.read_text(encoding="utf-8"))
    assert list(content) == ["benchmark", "hardware", "processor", "versions", "rows", "claims"]
    assert content["benchmark"] == name
    assert content["hardware"]
    assert {"python", "torch", "transformers"} <= content["versions"].keys()
    assert content["rows"]
    for row in content["rows"]:
        assert list(row) == list(content["rows"][0])  # a table: every row has the same columns
    for claim in content["claims"]:
        assert claim.keys() == {"claim", "value", "goal", "better", "met"}
        better = (
            claim["value"] >= claim["goal"]
            if claim["better"] == "higher"
            else claim["value"] <= claim["goal"]
        )
        assert claim["met"] == better
    return dict(content)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in NOT_QUICK])
def test_quick_run_writes_its_measurements(
    bench: Bench, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    target = bench(name, "--quick", *MORE.get(name, []))
    printed = capsys.readouterr().out
    if "skipped" in printed:
        # A package or a processor's kernel may be missing.
        assert name in ("evaluate", "linear")
        assert not target.exists()
    else:
        measured(target, name)


def finished(method: str, tmp_path: Path, options: Callable[..., list[str]]) -> Path:
    """A small finished run."""
    small = ["--data.limit_train", "64", "--data.limit_validation", "8", "--data.batch_size", "8"]
    small += [
        "--data.calibration_rows",
        "8",
        "--trainer.max_steps",
        "2",
        "--quantize.sequences",
        "32",
        "--quantize.group_size",
        "32",
    ]
    small += ["--validations", "1", "--sweep.thresholds", "[0.5]", "--quantize.bits", "[]"]
    main(["fit", *options("tiny", method, *small, "--wandb", "disabled", "--out", str(tmp_path))])
    return tmp_path / f"tiny-{method}-facts-s0"


@pytest.fixture
def finished_run(tmp_path: Path, options: Callable[..., list[str]]) -> Path:
    """One with routers."""
    return finished("qtale", tmp_path, options)


@pytest.mark.slow
def test_calibration_compares_on_a_finished_run(bench: Bench, finished_run: Path) -> None:
    target = bench("calibration", str(finished_run), "--quick", "--thresholds", "0.5")
    (row,) = measured(target, "calibration")["rows"]
    assert row["θ"] == 0.5


@pytest.mark.slow
def test_runs_are_measured_at_their_own_decisions(
    bench: Bench, finished_run: Path, tmp_path: Path, options: Callable[..., list[str]]
) -> None:
    dropped = finished("static", tmp_path, options)  # half of the layers
    target = bench("runs", str(finished_run), str(dropped), "--quick", "--bits", "16")
    first, second = measured(target, "runs")["rows"]
    assert first["score ×"] == first["limit"] == first["token limit"] == 1
    assert 0.5 < first["executed"] <= 1
    assert 0.5 < first["token executed"] <= 1
    assert second["executed"] == second["token executed"] == 0.5
    assert second["token limit"] > 1
    assert 0 <= second["accuracy %"] <= 100
    with pytest.raises(ValueError, match=r"selected no θ for a budget of 0\.8 at 16 bits: `thresholds"):
        bench("runs", str(finished_run), "--quick", "--bits", "16", "--budget", "0.8")


@pytest.mark.parametrize("name", ["quantize", "evaluate"])
def test_missing_rows_are_said(bench: Bench, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert not bench(name).exists()
    assert "skipped" in capsys.readouterr().out


def latency_row(form: str, ratio: float, speedup: float, **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "run": "decode 1 × 1",
        "form": form,
        "ratio": ratio,
        "speed-up": speedup,
        "ideal": 1 / ratio,
    } | more


def test_figure_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runpy_globals = runpy.run_path(str(BENCHMARKS / "plot_latency.py"))
    rows = [latency_row("dense", 1.0, 1.0), latency_row("masked", 0.5, 0.9)]
    rows += [latency_row("bf16", ratio, speedup) for ratio, speedup in ((1.0, 0.95), (0.25, 3.0), (0.5, 1.8))]
    rows += [latency_row("int4", 0.5, 1.7, run="prefill 2 × 16")]
    figure = runpy_globals["plot_latency"](rows)
    first, second = figure.axes
    assert second.get_title() == "tiny\nprefill 2 × 16"
    lines = {line.get_label(): line for line in first.get_lines()}
    assert lines["packed, bf16"].get_xydata().tolist() == [[0.25, 3.0], [0.5, 1.8], [1.0, 0.95]]
    ideal = lines["ideal, bf16"]
    assert ideal.get_xydata().tolist() == [[0.25, 4.0], [0.5, 2.0], [1.0, 1.0]]
    assert ideal.get_linestyle() == "--"
    assert ideal.get_color() == lines["packed, bf16"].get_color()
    (point,) = [line for label, line in lines.items() if label.startswith("masked")]
    assert point.get_xydata().tolist() == [[0.5, 0.9]]
    with pytest.raises(ValueError, match="no rows"):
        runpy_globals["plot_latency"](rows[:1])

    source, target = tmp_path / "latency.json", tmp_path / "latency.png"
    source.write_text(json.dumps({"rows": rows, "hardware": "a machine"}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["plot_latency.py", str(source), str(target)])
    runpy.run_path(str(BENCHMARKS / "plot_latency.py"), run_name="__main__")
    assert target.read_bytes().startswith(b"\x89PNG")
