"""The stage of the tables' training runs on SmolLM2-135M: as many as fit into its time; the next call goes on."""

import json
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

from gpu_check import wheels
from gpu_check.stages import ROOT, Context, StageFailed
from gpu_check.training import QUICK

KEPT = ROOT / "outputs" / "gpu-runs"  # not with the stage's other files: the next call goes on from here
TABLES = ("csqa", "baselines")  # their runs with seed 0 first, then those with one more seed, and so on
SEEDS = 3
JOBS = 6  # at a time: training leaves most of a GPU idle, and evaluation waits for the host
SHARE = 0.9  # of the time limit: stopped runs save what they resume from
LOOKS = 2.0  # seconds between looks at what is finished


def runs(context: Context) -> dict[str, Any]:
    """What each finished run's results say, by its folder.

    Raises:
        StageFailed: There are no weights, no run was finished, or a table failed.
    """
    if not context.quick:
        check_weights()
    out, ended = (context.work if context.quick else KEPT), time.monotonic() + SHARE * context.seconds
    tables = [quick_table(context.work)] if context.quick else TABLES
    for seeds, table in product(range(1, 2 if context.quick else SEEDS + 1), tables):
        command = [sys.executable, "-m", "qtale_lightning", "table", table, *options(context, seeds, out)]
        status = watched(command, context, out, ended)
        if status is None:
            break
        if status:
            outcome(context, out)
            raise StageFailed(f"{' '.join(command[2:])} ended with status {status}")
    if not (found := outcome(context, out))["finished"]:
        raise StageFailed("no run was finished")
    return found


def check_weights() -> None:
    """Refuse to start without SmolLM2's weights (StageFailed)."""
    from qtale_lightning.architectures import known_model
    from qtale_lightning.models.packages import installed

    if not installed(known_model("smollm2-135m")[1]):
        raise StageFailed(
            "SmolLM2-135M's weights aren't here: copy all pieces of the bundle, the last ones hold them"
        )


def quick_table(folder: Path) -> str:
    """A table of one line."""
    file = folder / "one.yaml"
    file.write_text("title: one\ncolumns: [average]\ncells: [{name: full, method: full}]\n", encoding="utf-8")
    return str(file)


def options(context: Context, seeds: int, out: Path) -> list[str]:
    """Of a table's command line."""
    model, jobs = ("tiny", 1) if context.quick else ("smollm2-135m", JOBS)
    given = ["--model", model, "--seeds", ",".join(map(str, range(seeds))), "--jobs", str(jobs)]
    given += ["--out", str(out), "--wandb", "disabled"]
    given += ["--trainer.accelerator", "gpu" if context.device == "cuda" else "cpu"]
    if rows := next(iter(sorted(wheels.around(ROOT).glob(f"*/{wheels.ROWS}"))), None):
        given += ["--data.tasks", "csqa", "--data.root", str(rows)]
    return [*given, *(QUICK if context.quick else ())]


def watched(command: list[str], context: Context, out: Path, end: float) -> int | None:
    """A command's exit status, what is finished being kept meanwhile; None where the time ended it."""
    process = subprocess.Popen(command, cwd=ROOT)
    while (status := process.poll()) is None and time.monotonic() < end:
        time.sleep(min(LOOKS, max(0.0, end - time.monotonic())))
        outcome(context, out)
    if status is None:
        process.send_signal(signal.SIGTERM)  # it stops its runs, and waits for them
        process.wait()
    return status


def outcome(context: Context, out: Path) -> dict[str, Any]:
    """Results of what is finished, whatever else is still running; kept in the stage's figures, too."""
    found: dict[str, Any] = {}
    for report in sorted(out.glob("**/results.md")):  # written last
        results = json.loads((report.parent / "results.json").read_text(encoding="utf-8"))
        parts = ("run", "train", "evaluation", "selected")
        found[str(report.parent.relative_to(out))] = {part: results.get(part) for part in parts}
    figures = {"finished": len(found), "runs": found}
    context.save(figures)
    return figures
