"""Callbacks: one job each. What runs after training is thin here and works on the run directory (stages)."""

from qtale_lightning.callbacks.checkpoints import Checkpoints
from qtale_lightning.callbacks.export import Export
from qtale_lightning.callbacks.finite import FiniteNumbers
from qtale_lightning.callbacks.quantize import AWQQuantization
from qtale_lightning.callbacks.report import Report
from qtale_lightning.callbacks.routing_monitor import RoutingMonitor
from qtale_lightning.callbacks.threshold_sweep import ThresholdSweep
from qtale_lightning.callbacks.totals import TrainingTotals

__all__ = [
    "AWQQuantization",
    "Checkpoints",
    "Export",
    "FiniteNumbers",
    "Report",
    "RoutingMonitor",
    "ThresholdSweep",
    "TrainingTotals",
]
