"""The stages that measure speed: benchmarks/graphs.py and benchmarks/latency.py."""

import json
from typing import Any

import graphs
import latency

from gpu_check.stages import Context

SHARE = 0.75  # of the time limit for measuring: imports and weights come before, and a growth step may be misjudged


def decode(context: Context) -> dict[str, Any]:
    """Rows and claims of a decoded token as one graph: LLaMA-2-7B whole, then LLaMA-3.1-8B while there is time."""
    arguments = ["--device", context.device, "--json", str(context.figures)]
    arguments += ["--quick"] if context.quick else ["--seconds", str(SHARE * context.seconds / 2)]
    graphs.main(arguments)
    figures: dict[str, Any] = json.loads(context.figures.read_text(encoding="utf-8"))
    return figures


def speed(context: Context) -> dict[str, Any]:
    """Rows and claims of LLaMA-2-7B, then of LLaMA-3.1-8B; first of few layers, then of as many as fit."""
    arguments = ["--device", context.device, "--json", str(context.figures)]
    if context.quick:
        arguments += ["--quick"]
    else:
        arguments += ["--model", "llama2-7b", "llama3.1-8b", "--layers", "32"]
        arguments += ["--seconds", str(SHARE * context.seconds / 2)]
    latency.main(arguments)
    figures: dict[str, Any] = json.loads(context.figures.read_text(encoding="utf-8"))
    return figures
