"""What is checked: stages in order of worth."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUDGET = 480  # seconds of all stages together: 8 minutes


class StageFailed(Exception):
    """A stage ran and found something wrong; the message says what, the figures are kept."""


@dataclass(frozen=True)
class Context:
    """What a stage's process is given.

    Attributes:
        device: "cuda" or "cpu".
        quick: At the smallest size, to see that everything starts.
        work: A folder for what the stage writes; it isn't kept.
        seconds: The stage's time limit.
        figures: File of what was measured so far: where the time runs out, that is what is left of a stage.
    """

    device: str
    quick: bool
    work: Path
    seconds: float
    figures: Path

    def save(self, figures: dict[str, Any]) -> None:
        """Keep what was measured so far; what is no number is null."""
        from qtale_lightning.finite import as_json  # here: the command itself needs no package

        unfinished = self.figures.with_suffix(".tmp")
        unfinished.write_text(json.dumps(as_json(figures), allow_nan=False), encoding="utf-8")
        unfinished.replace(self.figures)


@dataclass(frozen=True)
class Stage:
    """A part of the check.

    Attributes:
        name: Of its files.
        what: One line for people.
        seconds: Time limit.
        function: "module:name" in this package, from a :class:`Context` to figures.
        apart: Only where it is asked for by name, with time of its own.
    """

    name: str
    what: str
    seconds: int
    function: str
    apart: bool = False

    def load(self) -> Callable[[Context], dict[str, Any]]:
        """The function; imports what it needs."""
        module, name = self.function.split(":")
        return getattr(import_module(f"gpu_check.{module}"), name)


STAGES = (
    Stage("tests", "tests marked `cuda`", 60, "tests:tests"),
    Stage("parity", "packed = masked, int4, generation and graphs = their references", 70, "parity:parity"),
    Stage("decode", "a decoded token of LLaMA-2-7B and 3.1-8B as one CUDA graph", 90, "speed:decode"),
    Stage("latency", "prefill and decode by layers at LLaMA-2-7B's and 3.1-8B's widths", 60, "speed:speed"),
    Stage(
        "step", "a training step of LLaMA-2-7B, and its memory, beside Hugging Face + peft", 60, "step:step"
    ),
    Stage("quantize", "a layer of LLaMA-2-7B: AWQ's seconds and memory", 40, "quantize:quantize"),
    Stage("lora", "MODEL=tiny with LoRA on a frozen base, bf16-mixed", 40, "training:lora"),
    Stage("tiny", "MODEL=tiny from fit to report, in float32", 60, "training:tiny"),
    Stage("runs", "the tables' training runs on SmolLM2-135M, as many as fit", 540, "runs:runs", apart=True),
)
