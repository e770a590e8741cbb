"""During training: steps, examples, tokens and seconds, over all starts of a run."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from qtale_lightning.results.store import load_or_new, update_results
from qtale_lightning.run import RunDirectory

LOSSES = {
    "ce": "train/ce",
    "ratio": "train/ratio_loss",
    "entropy": "train/entropy_loss",
    "lambda_ratio": "train/lambda_ratio",  # the weight, which may rise
    "total": "train/loss",
}


class TrainingTotals(Callback):
    """Counts what training consumed and writes ``train`` of results.json; validation's seconds are left out.

    Examples and tokens are counted on every device, and added up where a checkpoint is saved and at the end.

    Args:
        run: The run's directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.examples = self.tokens = 0  # of all devices, up to the last time that they were added up
        self.seconds = 0.0
        self.losses: dict[str, float] = {}  # the last ones
        self._new = torch.zeros(2, dtype=torch.long)  # examples and tokens of this device since then
        self._started = 0.0
        self._trainer: L.Trainer | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Saving state has no trainer of its own."""
        self._trainer = trainer

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
        """Count this device's micro-batch."""
        self.seconds += time.perf_counter() - self._started
        mask = batch["attention_mask"]
        self._new = self._new.to(mask.device) + torch.stack([mask.new_tensor(len(mask)), mask.sum()])

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add up while the other devices are there to."""
        self._add_up()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the totals, also where an earlier start had trained all but couldn't."""
        if not trainer.is_global_zero or not self.seconds:
            return
        if not self._started and "train" in load_or_new(self.run.root):
            return
        totals = {
            "steps": trainer.global_step,
            "examples": self.examples,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "trainable_parameters": sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            "final_losses": self.losses,
        }
        update_results(self.run.root, "train", totals)

    def state_dict(self) -> dict[str, Any]:
        """What was counted so far, on all devices, which all must call this."""
        self._add_up()
        return {
            "examples": self.examples,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "losses": self.losses,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from there."""
        self.examples, self.tokens = state_dict["examples"], state_dict["tokens"]
        self.seconds, self.losses = state_dict["seconds"], state_dict.get("losses", {})

    def _add_up(self) -> None:
        """Add what is new on every device to the totals, and read the losses."""
        assert self._trainer is not None
        new = self._trainer.strategy.reduce(self._new.to(self._trainer.strategy.root_device), reduce_op="sum")
        assert isinstance(new, Tensor)
        examples, tokens = new.tolist()
        self.examples, self.tokens = self.examples + examples, self.tokens + tokens
        self._new = torch.zeros_like(self._new)
        logged = self._trainer.callback_metrics
        self.losses |= {name: float(logged[key]) for name, key in LOSSES.items() if key in logged}
