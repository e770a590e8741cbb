"""The stage of a training step: benchmarks/train_step.py at LLaMA-2-7B's shape."""

import json
from typing import Any

import train_step

from gpu_check.stages import Context


def step(context: Context) -> dict[str, Any]:
    """Rows and claims."""
    arguments = ["--device", context.device, "--json", str(context.figures)]
    if context.quick:
        arguments += ["--quick"]
    else:
        arguments += ["--model", "llama2-7b", "--layers", "32", "--router-width", "512", "--repeats", "5"]
    train_step.main(arguments)
    figures: dict[str, Any] = json.loads(context.figures.read_text(encoding="utf-8"))
    return figures
