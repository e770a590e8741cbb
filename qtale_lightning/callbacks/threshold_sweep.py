"""After training: accuracy and cost of every precision at every threshold."""

import lightning as L
from lightning.pytorch.callbacks import Callback

from qtale_lightning import stages
from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.evaluation.threshold import check_thresholds
from qtale_lightning.quantization.options import QuantizationOptions
from qtale_lightning.run import RunDirectory


class ThresholdSweep(Callback):
    """Scores each precision × each θ, and selects θ on held-out training questions by the one-standard-error rule.

    Args:
        thresholds: The grid of θ; 0.5 is D-LLM's, 0 executes everything.
    """

    def __init__(self, thresholds: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1, 0.03, 0.005)) -> None:
        check_thresholds(thresholds)
        self.thresholds = tuple(thresholds)
        self.run: RunDirectory | None = None
        self.quantization: QuantizationOptions | None = None  # whose precisions are swept

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Works on the run directory; the live module isn't touched."""
        if self.run is None or self.quantization is None or not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, CommonsenseDataModule)
        stages.sweep(self.run, data, self.quantization.bits, self.quantization.engine, self.thresholds)
