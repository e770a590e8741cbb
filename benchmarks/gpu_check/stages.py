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
        """Keep what was measured so far."""
        unfinished = self.figures.with_suffix(".tmp")
        unfinished.write_text(json.dumps(figures), encoding="utf-8")
        unfinished.replace(self.figures)


@dataclass(frozen=True)
class Stage:
    """A part of the check.

    Attributes:
        name: Of its files.
        what: One line for people.
        seconds: Time limit.
        function: "module:name" in this package, from a :class:`Context` to figures.
    """

    name: str
    what: str
    seconds: int
    function: str

    def load(self) -> Callable[[Context], dict[str, Any]]:
        """The function; imports what it needs."""
        module, name = self.function.split(":")
        return getattr(import_module(f"gpu_check.{module}"), name)


STAGES = (
    Stage("tiny", "MODEL=tiny from fit to report, in float32", 150, "training:tiny"),
    Stage("parity", "packed = masked, int4 and generation = their references", 100, "parity:parity"),
    Stage("lora", "MODEL=tiny with LoRA on a frozen base, bf16-mixed", 70, "training:lora"),
    Stage("latency", "prefill and decode at LLaMA-2-7B's widths", 150, "speed:speed"),
)
