"""During training: the best checkpoint and the newest one."""

import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from qtale_lightning.checkpoints import require_best
from qtale_lightning.finite import NonFiniteError
from qtale_lightning.manifest import keep
from qtale_lightning.run import RunDirectory

log = logging.getLogger(__name__)


class Checkpoints(Checkpoint):
    """Keeps ``best.ckpt``, which is exported, and ``last.ckpt``, which an interrupted run goes on from.

    A run that was killed anywhere and goes on ends as if it hadn't been:

    - The newest checkpoint claims no work that isn't done: a step that a validation follows is saved behind it, and
      the best one before the newest.
    - The best score is part of both, and no path is, so that a run's folder may be moved.
    - The newest but one stays as ``last.previous.ckpt``, for a newest one that is damaged later.

    Lightning's ModelCheckpoint does none of these.

    Args:
        run: The run's directory.
        every_n_steps: Optimizer steps between two saves of the newest checkpoint; validations and the end come on top.
        monitor: Logged value of which the best checkpoint has the lowest.
    """

    def __init__(self, run: RunDirectory, every_n_steps: int, monitor: str = "val/loss") -> None:
        self.run, self.every_n_steps, self.monitor = run, every_n_steps, monitor
        self.best_score: float | None = None
        self.best_step: int | None = None  # None: there is no best checkpoint yet
        self._saved = 0  # step of the newest checkpoint
        self._before = 0  # step in front of the current micro-batch
        self._stepped = (
            False  # whether the last micro-batch ended a step: between two, gradients would be lost
        )
        self._sound = False  # whether what lies at last.ckpt is known to be good

    def state_dict(self) -> dict[str, Any]:
        """The best score and its step."""
        return {"best_score": self.best_score, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What is resumed from needn't be saved again; a best checkpoint that is lost is missed now, not at the end."""
        self._saved = trainer.global_step
        resumed = None if trainer.ckpt_path is None else Path(trainer.ckpt_path)
        self._sound = resumed == self.run.last
        if self.best_step is None or self.run.model().is_dir():
            return
        if resumed is not None and resumed.parent == self.run.best.parent:
            require_best(self.run, self.best_step)
        elif not self.run.best.is_file():  # a checkpoint of elsewhere, without its best one
            self.best_score = self.best_step = None

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Remember the step, to tell whether the micro-batch ends it."""
        self._before = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Save the newest checkpoint where it is time to, unless a validation follows, which does so when it ends."""
        self._stepped = trainer.global_step != self._before
        if self._stepped and trainer.global_step % self.every_n_steps == 0 and not _validates_now(trainer):
            self._save_last(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the best checkpoint if it is one, then the newest.

        Raises:
            NonFiniteError: The score isn't finite.
        """
        if trainer.sanity_checking:
            return
        score = float(trainer.callback_metrics[self.monitor])
        if not math.isfinite(score):
            raise NonFiniteError(
                f"{self.monitor} is {score} at step {trainer.global_step}: the calibration rows give no finite loss. "
                f"Nothing of this step is saved; try --trainer.precision 32-true, or a lower --model.lr in a new run"
            )
        better = self.best_score is None or score < self.best_score
        if trainer.strategy.reduce_boolean_decision(better):
            self._save_best(trainer, score)
        if self._stepped:
            self._save_last(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate where no validation has been due before, and save what was trained since the last save."""
        if self.best_step is None and trainer.enable_validation:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        if self.best_step is None:
            log.warning("no validation ran: what training ended with is taken as the best")
            self._save_best(trainer, None)
        if self._saved != trainer.global_step:
            self._save_last(trainer)

    def _save_best(self, trainer: L.Trainer, score: float | None) -> None:
        self.best_score, self.best_step = score, trainer.global_step
        trainer.save_checkpoint(self.run.best, weights_only=False)

    def _save_last(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero and self._sound and self.run.last.is_file():
            keep(self.run.root, self.run.last, self.run.previous)
        trainer.save_checkpoint(self.run.last, weights_only=False)
        self._saved, self._sound = trainer.global_step, True


def _validates_now(trainer: L.Trainer) -> bool:
    """Whether a validation follows the micro-batch that has just been trained on."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
