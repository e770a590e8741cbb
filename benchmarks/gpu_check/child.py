"""One stage in a process of its own: `python -m gpu_check.child STAGE …`; writes its JSON when done."""

import argparse
import json
import logging
import time
import traceback
from pathlib import Path
from typing import Any

from gpu_check.stages import STAGES, Context, StageFailed

LAST_LINES = 12  # of a traceback


def run(name: str, context: Context) -> dict[str, Any]:
    """What a stage's JSON holds; never raises for what a stage does."""
    started = time.perf_counter()
    outcome: dict[str, Any] = {"stage": name, "status": "passed"}
    try:
        stage = next(stage for stage in STAGES if stage.name == name)
        context.save(stage.load()(context))
    except (Exception, SystemExit) as error:  # whatever happens in a stage is what the check is for
        outcome["status"] = "failed"
        lines = traceback.format_exception(error)
        outcome["error"] = (
            [str(error)] if isinstance(error, StageFailed) else "".join(lines).splitlines()[-LAST_LINES:]
        )
    if context.figures.is_file():  # of a failed stage, too: what it found before
        outcome["figures"] = json.loads(context.figures.read_text(encoding="utf-8"))
    outcome["seconds"] = round(time.perf_counter() - started, 2)
    return outcome | machine()


def machine() -> dict[str, Any]:
    """The device, in words, and the versions of what ran."""
    import torch

    from qtale_lightning.results.metadata import hardware, package_versions

    versions: dict[str, Any] = package_versions() | {"CUDA": torch.version.cuda}
    return {"device": hardware(), "versions": versions}


def main() -> None:
    """Run a stage and write `<out>`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=[stage.name for stage in STAGES])
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    context = Context(args.device, args.quick, args.work, args.seconds, args.figures)
    outcome = run(args.stage, context)
    unfinished = args.json.with_suffix(".tmp")
    unfinished.write_text(json.dumps(outcome, indent=1, allow_nan=False), encoding="utf-8")
    unfinished.replace(args.json)


if __name__ == "__main__":
    main()
