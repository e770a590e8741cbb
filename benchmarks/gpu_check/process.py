"""A stage's process: its environment, its time limit, and what is left of it where it ends badly."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_check.stages import ROOT, Stage

LAST_LINES = 12  # of a log
GRACE = 5  # seconds between asking a process to end and ending it


def environment(device: str, work: Path) -> dict[str, str]:
    """No network, the unpacked wheels, and the GPU only where it is asked for."""
    parts = [str(ROOT), str(ROOT / "benchmarks"), str(work / "site"), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, parts)), "MPLBACKEND": "Agg"}
    own |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    own["TRITON_INTERPRET"] = str(int(device == "cpu"))
    if device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
    else:
        own["QTALE_CPU_KERNELS"] = "0"  # nobody waits for a compiler
    return os.environ | own


def run_stage(
    stage: Stage, device: str, quick: bool, seconds: float, work: Path, out: Path
) -> dict[str, Any]:
    """Run a stage and return what its JSON in ``out`` holds, whatever became of its process.

    Args:
        stage: To run.
        device: "cuda" or "cpu".
        quick: At the smallest size.
        seconds: Time limit.
        work: Folder of the unpacked wheels, of what the stage writes and of its log.
        out: Folder of the JSON files, and of the logs of all stages in one file.
    """
    target, figures = out / f"{stage.name}.json", work / f"{stage.name}-figures.json"
    log = work / f"{stage.name}.log"
    own = work / stage.name
    own.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    started = time.monotonic()
    ended = "not run: the time of all stages was used up"
    if seconds > 0:
        given = ["--device", device, "--work", str(own), "--seconds", str(seconds)]
        given += ["--figures", str(figures), "--json", str(target), *(["--quick"] if quick else [])]
        ended = _run([*command(stage), *given], environment(device, work), seconds, log)
        with (out / "log.txt").open("a", encoding="utf-8") as all_logs:
            all_logs.write(f"== {stage.name}\n{log.read_text(encoding='utf-8', errors='replace')}\n")
    if target.is_file():
        outcome: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
        return outcome
    outcome = {"stage": stage.name, "status": "not run" if seconds <= 0 else "failed", "device": device}
    outcome |= {"seconds": round(time.monotonic() - started, 2)}
    if figures.is_file():
        outcome["figures"] = json.loads(figures.read_text(encoding="utf-8"))
    last = (
        log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:] if log.is_file() else []
    )
    outcome["error"] = [*last, ended]
    target.write_text(json.dumps(outcome, indent=1), encoding="utf-8")
    return outcome


def command(stage: Stage) -> list[str]:
    """What starts a stage's process."""
    return [sys.executable, "-m", "gpu_check.child", stage.name]


def _run(command: list[str], env: dict[str, str], seconds: float, log: Path) -> str:
    """Run a command to its end or to the time limit, with all that it started; returns how it ended, in words."""
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            return f"ended with status {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            return f"stopped: its {seconds:.0f} s were over"
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it started."""
    for one in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, one)
            process.wait(GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
