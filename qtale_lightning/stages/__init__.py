"""The stages after training, each on a run directory: export, quantize, sweep. None repeats what is there."""

from qtale_lightning.stages.evaluate import evaluate, sweep
from qtale_lightning.stages.export import export, load_exported
from qtale_lightning.stages.quantize import quantize

__all__ = ["evaluate", "export", "load_exported", "quantize", "sweep"]
