"""The stages after training, each on a run directory: export, quantize, sweep, inspect. None repeats what is there."""

from qtale_lightning.stages.evaluate import evaluate
from qtale_lightning.stages.export import export, load_exported
from qtale_lightning.stages.inspect import inspect, own_texts, question_texts
from qtale_lightning.stages.quantize import quantize
from qtale_lightning.stages.sweep import sweep

__all__ = [
    "evaluate",
    "export",
    "inspect",
    "load_exported",
    "own_texts",
    "quantize",
    "question_texts",
    "sweep",
]
