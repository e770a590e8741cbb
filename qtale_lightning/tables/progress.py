"""How long a table's commands take, about: by the runs that are there, or by counted FLOPs where there is none."""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qtale_lightning.results.store import load_or_new
from qtale_lightning.tables.rows import Command

START = 15.0
"""Seconds that a command takes to start, to read its data and to load its model, about."""
EFFICIENCY = 0.4
"""Share of a large matrix product's speed that training reaches, about."""
LENGTH = 0.25
"""Questions' length as a share of the sequences that the plan's FLOPs are counted for, about."""
SHARE = 0.05
"""An evaluation's time as a share of the training's, where no run says it."""


@dataclass
class Estimate:
    """Seconds of commands, from what finished runs of the model took; corrected by what commands took since.

    Attributes:
        source: What it goes by, in words.
    """

    per_step: float | None
    per_evaluation: float | None
    per_flop: float
    source: str
    expected: float = 0.0
    measured: float = 0.0

    def seconds(self, commands: Iterable[Command]) -> float:
        """Of these commands."""
        raw = sum(self._raw(command) for command in commands)
        return raw * (self.measured / self.expected if self.expected else 1.0)

    def learn(self, command: Command, seconds: float) -> None:
        """What a command took."""
        self.expected, self.measured = self.expected + self._raw(command), self.measured + seconds

    def _raw(self, command: Command) -> float:
        training = command.run.flops * self.per_flop
        if self.per_step is not None:
            training = command.run.steps * self.per_step
        evaluation = training * SHARE if self.per_evaluation is None else self.per_evaluation
        fit = training if command.kind == "fit" else 0.0
        return START + fit + command.evaluations * evaluation


def estimate(model: str, runs: Sequence[Path]) -> Estimate:
    """By the finished runs of a model among `runs`; without one, by the speed of this machine's matrix products."""
    steps, evaluations, count = [], [], 0
    for root in runs:
        results = load_or_new(root)
        if results.get("run", {}).get("model") != model or "train" not in results:
            continue
        count += 1
        steps.append(results["train"]["seconds"] / max(1, results["train"]["steps"]))
        evaluations += [row["seconds"] for row in results["evaluation"] if row["split"] == "validation"]
    if steps:
        per_evaluation = statistics.median(evaluations) if evaluations else None
        by = f"by {count} finished run{'s' * (count > 1)} of {model}"
        return Estimate(statistics.median(steps), per_evaluation, 0.0, by)
    return Estimate(
        None, None, LENGTH / (_speed() * EFFICIENCY), "roughly: by counted FLOPs, no run to go by yet"
    )


def _speed() -> float:
    """FLOP/s of a large matrix product here, in a tenth of a second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    matrix = torch.rand(
        size, size, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32
    )
    (matrix @ matrix).sum().item()
    started = time.perf_counter()
    (matrix @ matrix).sum().item()
    return 2.0 * size**3 / (time.perf_counter() - started)


def clock(seconds: float) -> str:
    """Such as 2:05, or 1:02:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def about(seconds: float) -> str:
    """A duration in words, to a digit or two."""
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
