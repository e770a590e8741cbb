"""After training: the best checkpoint, merged, as a Hugging Face folder."""

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from qtale_lightning import stages
from qtale_lightning.checkpoints import exported_weights
from qtale_lightning.module import QTALEModule
from qtale_lightning.run import RunDirectory


class Export(Callback):
    """Exports ``<run>/model`` from the best checkpoint, on a copy.

    The live module gives its model up for it, since a large one is in memory once: whatever comes after training reads
    the run's folder.

    Args:
        run: The run's directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checkpoints are closed by now; in on_train_end they would still be written afterwards.

        Raises:
            SIGTERMException: The run was told to end when its last step was done, where Lightning doesn't look.
            DamagedFileError: What is to be exported isn't what the run wrote.
        """
        if trainer.received_sigterm:
            raise SIGTERMException
        assert isinstance(pl_module, QTALEModule)
        pl_module.release()
        if not trainer.is_global_zero or self.run.model().is_dir():
            return
        dtype = torch.bfloat16 if str(trainer.precision).startswith("bf16") else torch.float32
        stages.export(self.run, pl_module.fresh(), exported_weights(self.run), dtype)
