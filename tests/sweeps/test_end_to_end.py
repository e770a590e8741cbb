"""A tiny sweep for real: a run as W&B's agent starts it, which the local runner then finds finished."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from qtale_lightning.__main__ import main
from qtale_lightning.results.store import load_results
from qtale_lightning.run import RunDirectory
from qtale_lightning.sweeps.definition import read_sweep

ROOT = Path(__file__).parents[2]
SMALL = (
    *("--data.limit_train", "16", "--data.limit_validation", "4", "--data.calibration_rows", "4"),
    *(
        "--data.batch_size",
        "4",
        "--trainer.max_steps",
        "1",
        "--validations",
        "1",
        "--trainer.accelerator",
        "cpu",
    ),
    *("--quantize.bits", "[]", "--sweep.thresholds", "[0.5]", "--wandb", "disabled"),
)


@pytest.mark.slow
def test_an_agents_run_and_the_local_runners_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)  # the command's files are relative
    variables = {"MODEL": "tiny", "DATA": "facts", "SEED": "0", "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    sweep = read_sweep(Path("sweeps/lambda2.yaml")).resolved(os.environ, SMALL)
    given = {"model.lambda_entropy": {"value": 0}, "_wandb": {"value": {"desc": None}}}
    known = create_sweep_command_args({"args": given}) | {
        "env": ["/usr/bin/env"],
        "interpreter": [sys.executable],
        "program": [sweep.program],
    }
    argv = [a for part in sweep.command for a in (known[part[2:-1]] if part.startswith("${") else [part])]
    assert any(argument.startswith("--_wandb=") for argument in argv)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "sweeps/lambda2-tiny-facts-s0"
    (run,) = (folder / "lambda_entropy=0").glob("tiny-*")
    command = load_results(run)["run"]["command"]
    assert command.endswith("--model.lambda_entropy=0")
    assert f"this run alone: {command}" in done.stdout
    assert "lambda_entropy: 0.0" in RunDirectory(run).config.read_text(encoding="utf-8")

    record = json.loads((folder / "lambda_entropy=0/trial.json").read_text(encoding="utf-8"))
    assert [row["bits"] for row in record["outcome"]] == [16]

    # The local runner finds the agent's run finished.
    main(["sweep", "start", "sweeps/lambda2.yaml", "--local", "--count", "1", "--", *SMALL])
    log = capsys.readouterr()
    assert "1 runs, 1 of them finished" in log.err
    assert str(folder / "sweep.md") in log.out
    assert "1 runs finished; 0 not." in (folder / "sweep.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["start", "sweeps/lamda2.yaml", "--local"], "known in sweeps: bits, lambda2"),
        (["start", "sweeps/bits.yaml", "--local"], "make sweep SWEEP=bits RUN=…"),
        (["start", "sweeps/lambda2.yaml"], "LOCAL=1 of make"),
        (["join", "entity/project/id"], "LOCAL=1 of make"),
        (["trial", "--to=x", "fit", "--", "nonsense"], "'nonsense'"),
        (["table", "sweeps"], "no runs of a sweep"),
    ],
    ids=" ".join,
)
def test_a_mistake_ends_in_one_message(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for name, value in {"MODEL": "tiny", "DATA": "facts", "SEED": "0", "OUT": "o", "RUN": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        main(["sweep", *arguments])
    assert end.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
