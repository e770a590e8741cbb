"""Runs the stages one after the other: `python3 -m gpu_check`, or `make gpu-check`. See the package."""

import argparse
import ctypes
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check import wheels
from gpu_check.process import run_stage
from gpu_check.stages import ROOT, STAGES, Stage

PATIENCE = 5  # on a CPU, whose minutes nobody lends


def gpus() -> int:
    """GPUs that CUDA's driver sees; asked without PyTorch, whose import takes seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    return count.value if driver.cuInit(0) == 0 == driver.cuDeviceGetCount(ctypes.byref(count)) else 0


def plan(stages: Sequence[Stage], lacking: Sequence[Path], budget: float) -> str:
    """What would run."""
    lines = [f"{stage.name:8} at most {stage.seconds:3} s  {stage.what}" for stage in stages]
    names = ", ".join(wheels.distribution(wheel) for wheel in lacking) or "none"
    return "\n".join([*lines, f"together at most {budget:.0f} s; wheels to unpack first: {names}"])


def check(args: argparse.Namespace, stages: Sequence[Stage], device: str) -> list[dict[str, Any]]:
    """Run the stages; a failed one stops no other. Returns their outcomes, which are in ``args.out`` too."""
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        site = Path(folder) / "site"
        found = [*wheels.wheels(ROOT), *wheels.joined(ROOT, Path(folder) / "joined")]
        names = wheels.unpack(wheels.missing(found), site)
        print(f"on {device}; unpacked: {', '.join(names) or 'nothing'}", flush=True)
        for stage in stages:
            limit = min(args.patience * stage.seconds, args.budget - (time.monotonic() - started))
            outcomes.append(run_stage(stage, device, args.quick, limit, Path(folder), args.out))
            print(line(outcomes[-1]), flush=True)
            summary = {"device": device, "seconds": round(time.monotonic() - started, 1), "stages": outcomes}
            (args.out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return outcomes


def line(outcome: dict[str, Any]) -> str:
    """An outcome in the table."""
    why = f"  {outcome['error'][-1]}" if outcome.get("error") else ""
    return f"{outcome['stage']:8} {outcome['status']:10} {outcome['seconds']:6.1f} s{why}"


def main() -> int:
    """The command; its exit status: 1 where a stage didn't pass."""
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--quick", action="store_true", help="each stage at its smallest, to see that it starts"
    )
    parser.add_argument(
        "--stages",
        nargs="*",
        choices=names,
        default=[stage.name for stage in STAGES if not stage.apart],
        metavar="STAGE",
        help=f"{' '.join(names)}; by default all but the last",
    )
    parser.add_argument(
        "--budget", type=float, help="seconds of all stages together; by default what they may take"
    )
    parser.add_argument(
        "--patience", type=float, help=f"times stages' limits; by default 1 on a GPU, {PATIENCE} on a CPU"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "outputs" / "gpu-check", help="folder of the JSON files"
    )
    args = parser.parse_args()
    stages = [stage for stage in STAGES if stage.name in args.stages]
    args.patience = args.patience or (PATIENCE if args.device == "cpu" else 1)
    args.budget = args.budget if args.budget is not None else args.patience * sum(s.seconds for s in stages)
    if args.device == "auto" and not gpus():
        print("There is no GPU here. On one this would run (`--device cpu --quick` tries it without):")
        print(plan(stages, wheels.missing(wheels.wheels(ROOT)), args.budget))
        return 0
    if lacking := [name for name in ("torch", "transformers") if not wheels.installed(name)]:
        print(
            f"error: {sys.executable} has no {' and no '.join(lacking)}, and the bundle brings none: run another one"
        )
        return 2
    outcomes = check(args, stages, "cuda" if args.device == "auto" else args.device)
    print("\n".join(["", *map(line, outcomes), f"details: {args.out}"]))
    return int(any(outcome["status"] != "passed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
