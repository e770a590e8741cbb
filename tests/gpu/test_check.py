"""The check of a GPU, held on the CPU: what it plans, that every stage starts, and that none takes others along."""

import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.gpu.conftest import BENCHMARKS, Load

ROOT = Path(__file__).parents[2]


def run(load: Load, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_check", *arguments])
    return int(load("gpu_check.__main__").main())


def test_without_a_gpu_it_says_what_it_would_run(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load("gpu_check.__main__"), "gpus", lambda: 0)
    assert run(load, monkeypatch) == 0
    printed = capsys.readouterr().out
    for stage in load("gpu_check.stages").STAGES:
        assert (stage.what in printed) == (not stage.apart)
    assert "480 s" in printed


def test_a_python_without_pytorch_is_named(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(load("gpu_check.wheels"), "installed", lambda name: name != "torch")
    assert run(load, monkeypatch, "--device", "cpu", "--out", str(tmp_path)) == 2
    printed = capsys.readouterr().out
    assert sys.executable in printed
    assert "no torch," in printed


def test_the_stages_fit_their_time(load: Load) -> None:
    stages = load("gpu_check.stages")
    together = [stage for stage in stages.STAGES if not stage.apart]
    assert sum(stage.seconds for stage in together) <= stages.BUDGET <= 8 * 60
    assert all(stage.seconds < 600 for stage in stages.STAGES)  # what a call on a lent machine may take


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "parity", "lora", "decode", "step", "quantize", "runs"])
def test_a_stage_runs_on_the_cpu(name: str, load: Load, tmp_path: Path) -> None:
    """In this process; how stages are started as their own is the same for all of them."""
    context = load("gpu_check.stages").Context("cpu", True, tmp_path, 1000.0, tmp_path / "figures.json")
    passed(load("gpu_check.child").run(name, context))


@pytest.mark.slow
def test_a_stage_starts_as_a_process_of_its_own(load: Load, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpu_check", "--device", "cpu", "--quick", "--budget", "1000"]
    subprocess.run(
        [*command, "--out", str(tmp_path), "--stages", "latency", "tests"], cwd=BENCHMARKS, check=True
    )
    stages = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["stages"]
    for stage in stages:
        assert stage == json.loads((tmp_path / f"{stage['stage']}.json").read_text(encoding="utf-8"))
        passed(stage)
    every = {stage.name for stage in load("gpu_check.stages").STAGES}
    above = {"tiny", "parity", "lora", "decode", "step", "quantize", "runs"}
    assert every == above | {stage["stage"] for stage in stages}, "these and those above"


def passed(outcome: dict[str, Any]) -> None:
    """A stage did, and says what it found and by what."""
    assert outcome["status"] == "passed", outcome["error"]
    assert {"python", "torch", "transformers", "CUDA"} <= outcome["versions"].keys()
    assert outcome["figures"]


# Stages that end badly

SCRIPTS = {
    "good": "target.write_text(json.dumps({'stage': 'good', 'status': 'passed', 'seconds': 0.1}))",
    "broken": "print('what happened'); sys.exit(3)",
    "hanging": "figures.write_text('{\"half\": 1}'); print('began', flush=True); time.sleep(60)",
}


@pytest.fixture
def scripted(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The command, with stages that run scripts, in half a second each."""
    start = "import json, sys, time; from pathlib import Path; given = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
    start += "target, figures = Path(given['--json']), Path(given['--figures'])\n"
    stages = load("gpu_check.stages")
    made = tuple(stages.Stage(name, f"what {name} does", 2, "none:none") for name in SCRIPTS)
    script = lambda stage: [sys.executable, "-I", "-S", "-c", start + SCRIPTS[stage.name]]  # noqa: E731
    monkeypatch.setattr(load("gpu_check.process"), "command", script)
    command = load("gpu_check.__main__")
    monkeypatch.setattr(command, "STAGES", made)
    return command


@pytest.mark.slow
def test_a_failed_stage_stops_no_other(
    scripted: ModuleType, load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stages = ("broken", "hanging", "good")
    monkeypatch.setattr(
        scripted, "STAGES", sorted(scripted.STAGES, key=lambda stage: stages.index(stage.name))
    )
    started = time.monotonic()
    assert run(load, monkeypatch, "--device", "cpu", "--patience", "1", "--out", str(tmp_path)) == 1
    assert time.monotonic() - started < 30  # the hanging one's 2 s, and what processes need
    outcomes = {name: json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in stages}
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        "broken": "failed",
        "hanging": "failed",
        "good": "passed",
    }
    assert outcomes["broken"]["error"] == ["what happened", "ended with status 3"]
    assert outcomes["hanging"]["error"] == ["began", "stopped: its 2 s were over"]
    assert outcomes["hanging"]["figures"] == {"half": 1}  # what it measured before
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["stages"] == list(outcomes.values())
    assert "what happened" in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_a_stage_without_time_is_not_run(
    scripted: ModuleType, load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = ("--device", "cpu", "--out", str(tmp_path), "--budget", "0", "--stages", "good")
    assert run(load, monkeypatch, *given) == 1
    outcome = json.loads((tmp_path / "good.json").read_text(encoding="utf-8"))
    assert outcome["status"] == "not run"


def test_what_a_stage_raises_is_kept_with_its_figures(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stages, child = load("gpu_check.stages"), load("gpu_check.child")
    context = stages.Context("cpu", True, tmp_path, 1.0, tmp_path / "figures.json")

    def fails(context: Any) -> dict[str, Any]:
        context.save({"measured": 2})
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(stages.Stage, "load", lambda self: fails)
    outcome = child.run("tiny", context)
    assert (outcome["status"], outcome["figures"]) == ("failed", {"measured": 2})
    assert outcome["error"][-1] == "RuntimeError: CUDA error: an illegal memory access"


def test_a_wrong_result_fails_the_comparisons(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """NaN too, and a part that breaks hides no other."""
    parity, stages = load("gpu_check.parity"), load("gpu_check.stages")

    def breaks(*_: Any) -> Iterator[Any]:
        raise RuntimeError("no kernel")
        yield

    parts = {
        "executions": lambda *_: [
            parity.Check("right", 1e-6, 1e-4),
            parity.Check("nothing", float("nan"), 1e-4),
        ],
        "caches": lambda *_: [parity.Check("wrong", 0.5, 1e-4)],
        "flat_attention": breaks,
    }
    for name, part in parts.items():
        part.__name__ = name
    monkeypatch.setattr(parity, "PARTS", tuple(parts.values()))
    context = stages.Context("cpu", True, tmp_path, 1.0, tmp_path / "figures.json")
    with pytest.raises(stages.StageFailed, match="3 of 4 comparisons failed: nothing; wrong; flat_attention"):
        parity.parity(context)
    kept = json.loads(context.figures.read_text(encoding="utf-8"))["checks"]
    assert kept["flat_attention"]["error"] == "RuntimeError: no kernel"
    assert kept["nothing"]["error"] is None  # JSON has no NaN


# The bundle


def wheel(folder: Path, name: str, tag: str = "py3-none-any", inside: str = "") -> Path:
    file = folder / f"{name}-1.0-{tag}.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{inside}{name}/__init__.py", "there = True\n")
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Name: {name}\nVersion: 1.0\n")
    return file


def test_wheels_of_missing_packages_are_unpacked(load: Load, tmp_path: Path) -> None:
    wheels = load("gpu_check.wheels")
    lacking = [
        wheel(tmp_path, "qtale_nowhere"),
        wheel(tmp_path, "qtale_aside", inside="qtale_aside-1.0.data/purelib/"),
    ]
    found = [wheel(tmp_path, "torch"), *lacking]
    assert wheels.missing(found) == lacking
    site = tmp_path / "site"
    assert wheels.unpack(lacking, site) == ["qtale_nowhere", "qtale_aside"]
    for name in ("qtale_nowhere", "qtale_aside"):
        assert (site / name / "__init__.py").is_file()
    with pytest.raises(ValueError, match="another Python"):
        wheels.unpack([wheel(tmp_path, "old", "cp27-cp27m-win32")], site)


def test_the_bundles_versions_are_the_projects(load: Load) -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    own = dict(line.replace("[signatures]", "").split("==") for line in lines if "==" in line)
    pins = dict(pin.split("==") for pin in load("gpu_check.bundle").requirements())
    assert {name: pins[name] for name in own.keys() & pins.keys()} == {
        n: own[n] for n in own.keys() & pins.keys()
    }
    assert {"lightning", "peft", "pandas", "scipy", "jsonargparse"} <= own.keys() & pins.keys()


def test_pieces_are_filled_in_order_of_need(load: Load) -> None:
    pieces = load("gpu_check.bundle").pieces
    assert pieces([30, 20, 40, 5], 4, 60) == [[0, 1, 3], [2]]


def test_a_large_wheel_is_cut_and_put_together(load: Load, tmp_path: Path) -> None:
    """A part that is missing leaves the package out; parts that aren't its own are refused."""
    wheels, root = load("gpu_check.wheels"), tmp_path / "1" / "project"
    whole = wheel(tmp_path, "qtale_large")
    content = whole.read_bytes()
    parts = wheels.cut(whole, 150)
    assert len(parts) > 2
    assert max(part.stat().st_size for part in parts) <= 150
    assert not whole.exists()
    for number, part in enumerate(parts, start=1):
        home = tmp_path / str(number) / "wheels"
        home.mkdir(parents=True, exist_ok=True)
        assert wheels.joined(root, tmp_path / "joined") == []
        parts[number - 1] = part.rename(home / part.name)
    (made,) = wheels.joined(root, tmp_path / "joined")
    assert (made.name, made.read_bytes()) == (whole.name, content)
    assert wheels.unpack([made], tmp_path / "site") == ["qtale_large"]
    parts[0].write_bytes(parts[0].read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="copy them again"):
        wheels.joined(root, tmp_path / "joined")


def test_runs_need_the_weights(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stages, runs = load("gpu_check.stages"), load("gpu_check.runs")
    monkeypatch.setattr("qtale_lightning.models.packages.installed", lambda model: False)
    context = stages.Context("cpu", False, tmp_path, 1.0, tmp_path / "figures.json")
    with pytest.raises(stages.StageFailed, match="all pieces"):
        runs.runs(context)


def test_runs_that_no_time_is_left_for_are_stopped(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is finished by then is kept; with nothing finished, the stage failed."""
    stages, runs = load("gpu_check.stages"), load("gpu_check.runs")
    monkeypatch.setattr(runs, "check_weights", lambda: None)
    monkeypatch.setattr(runs, "KEPT", tmp_path)
    wait = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(3)); time.sleep(60)"
    monkeypatch.setattr(runs.subprocess, "Popen", partial(_instead, subprocess.Popen, wait))
    context = stages.Context("cpu", False, tmp_path / "work", 0.5, tmp_path / "figures.json")
    with pytest.raises(stages.StageFailed, match="no run was finished"):
        runs.runs(context)
    there = tmp_path / "model-full-facts-s0"
    there.mkdir()
    (there / "results.json").write_text(json.dumps({"train": {"steps": 1}, "evaluation": []}))
    (there / "results.md").touch()
    found = runs.runs(context)
    assert found["runs"]["model-full-facts-s0"]["train"] == {"steps": 1}
    assert json.loads(context.figures.read_text(encoding="utf-8")) == found


def _instead(popen: Any, script: str, command: list[str], **options: Any) -> Any:
    """A process that waits, in place of one that trains."""
    return popen([sys.executable, "-I", "-S", "-c", script], **options)


def test_the_bundle_is_found_and_runs_from_where_it_is_unpacked(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = load("gpu_check.bundle")
    monkeypatch.setattr(
        bundle, "download", lambda python, folder: [wheel(folder, "some"), wheel(folder, "more")]
    )
    monkeypatch.setattr(bundle, "pieces", lambda *_: [[0], [1]])
    made = dict(bundle.make("3.12", 2**26, tmp_path / "bundle"))
    assert [folder.name for folder in made] == ["1", "2"]
    assert all(size > 0 for size in made.values())
    project = tmp_path / "bundle" / "1" / "project"
    for file in (
        "qtale_lightning/compat/__init__.py",
        "qtale_lightning/models/tiny/tokenizer.json",
        "experiments/base.yaml",
    ):
        assert (project / file).is_file()
    assert not (project / "benchmarks/results").exists()
    found = load("gpu_check.wheels").wheels(project)
    assert [file.name for file in found] == ["some-1.0-py3-none-any.whl", "more-1.0-py3-none-any.whl"]
    command = ["sh", str(tmp_path / "bundle" / "1" / "run"), "--help"]
    assert "--quick" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


# How many layers the time allows


def test_layers_grow_with_the_time(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second a layer: 4 first, then as many as 4 / 5 of the rest allows."""
    latency = load("latency")
    now, tried = [0.0], []

    def measure(name: str, layers: int, args: Any) -> list[dict[str, Any]]:
        tried.append(layers)
        now[0] += layers
        return [{"layers": layers}]

    monkeypatch.setattr(latency, "measure", measure)
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    for given, expected in (
        (["--seconds", "24", "--layers", "32"], [4, 16]),
        (["--seconds", "100", "--layers", "32"], [4, 32]),
        (["--seconds", "3", "--layers", "32"], [4]),
        (["--layers", "8"], [8]),
    ):
        now[0], tried[:] = 0.0, []
        rows = list(latency.attempts("llama2-7b", latency.options().parse_args(given)))
        assert tried == expected
        assert rows[-1] == [{"layers": expected[-1]}]
