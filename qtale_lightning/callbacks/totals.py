"""During training: steps, examples, tokens and seconds, over all starts of a run."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from qtale_lightning.report.results import update_results
from qtale_lightning.run import RunDirectory


class TrainingTotals(Callback):
    """Counts what training consumed and writes ``train`` of results.json; validation's seconds are left out.

    Args:
        run: The run's directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.examples = self.tokens = 0
        self.seconds = 0.0
        self._started = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
    ) -> None:
        """Count the micro-batch of every device."""
        self.seconds += time.perf_counter() - self._started
        self.examples += len(batch["input_ids"]) * trainer.world_size
        self.tokens += int(batch["attention_mask"].sum()) * trainer.world_size

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the totals."""
        if not trainer.is_global_zero or not self.seconds:
            return
        logged = trainer.callback_metrics
        names = {
            "ce": "train/ce",
            "ratio": "train/ratio_loss",
            "entropy": "train/entropy_loss",
            "total": "train/loss",
        }
        totals = {
            "steps": trainer.global_step,
            "examples": self.examples,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "trainable_parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "final_losses": {name: float(logged[key]) for name, key in names.items() if key in logged},
        }
        update_results(self.run.root, "train", totals)

    def state_dict(self) -> dict[str, Any]:
        """What was counted so far."""
        return {"examples": self.examples, "tokens": self.tokens, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from there."""
        self.examples, self.tokens = state_dict["examples"], state_dict["tokens"]
        self.seconds = state_dict["seconds"]
