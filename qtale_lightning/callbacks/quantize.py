"""After training: quantization at each of the asked precisions."""

import lightning as L
from lightning.pytorch.callbacks import Callback

from qtale_lightning import stages
from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.quantization.options import QuantizationOptions
from qtale_lightning.run import RunDirectory


class AWQQuantization(Callback):
    """Quantizes the exported model.

    Args:
        run: The run's directory.
        options: What to make of it.
    """

    def __init__(self, run: RunDirectory, options: QuantizationOptions) -> None:
        self.run, self.options = run, options

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Works on the run directory; the live module isn't touched."""
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, CommonsenseDataModule)
        stages.quantize(self.run, data, self.options)
