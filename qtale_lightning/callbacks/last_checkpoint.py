"""During training: the newest checkpoint, whether or not it is the best."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``, what an interrupted run resumes from, every few steps and at the end of training.

    ModelCheckpoint's own ``save_last`` writes beside a new best checkpoint only, so that steps behind the best one
    would be lost.

    Args:
        path: The checkpoint file.
        every_n_train_steps: Optimizer steps between two saves.
    """

    def __init__(self, path: Path, every_n_train_steps: int) -> None:
        super().__init__(
            dirpath=path.parent,
            filename=path.stem,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what was trained since the last save."""
        super().on_train_end(trainer, pl_module)
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
