"""After training: accuracy and cost of every precision at every threshold."""

import lightning as L
from lightning.pytorch.callbacks import Callback

from qtale_lightning import stages
from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.evaluation.budget import UnmetBudgetError
from qtale_lightning.evaluation.options import SweepOptions
from qtale_lightning.quantization.options import QuantizationOptions
from qtale_lightning.run import RunDirectory


class ThresholdSweep(Callback):
    """Scores each precision × each θ, and selects θ on held-out training questions.

    Args:
        run: The run's directory.
        options: The grid, and how θ is selected.
        quantization: Whose precisions are swept.
    """

    def __init__(self, run: RunDirectory, options: SweepOptions, quantization: QuantizationOptions) -> None:
        self.run, self.options, self.quantization = run, options, quantization
        self._unmet: UnmetBudgetError | None = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Works on the run directory; the live module isn't touched."""
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, CommonsenseDataModule)
        try:
            stages.sweep(self.run, data, self.quantization.bits, self.quantization.engine, self.options)
        except UnmetBudgetError as error:
            self._unmet = error

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ends the run with the budgets that weren't met, behind the report of all that was."""
        if self._unmet is not None:
            raise self._unmet
