"""During training: how the routers decide, averaged over the last steps, for the report."""

from collections import deque
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from qtale_lightning.report.results import update_results
from qtale_lightning.run import RunDirectory

WINDOW = 50  # micro-batches: long enough to average Gumbel noise out, short enough to be the end of training


class RoutingMonitor(Callback):
    """Keeps the last routing statistics that the module logged, and writes ``routing`` of results.json.

    Args:
        run: The run's directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.window: deque[dict[str, float]] = deque(maxlen=WINDOW)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Read what the module logged for this micro-batch."""
        names = ("flip_ratio", "logit_gap", "entropy", "execution_ratio_layer_")
        logged = {
            k.removeprefix("train/"): v for k, v in trainer.callback_metrics.items() if k.startswith("train/")
        }
        self.window.append(
            {k: float(v) for k, v in logged.items() if k.startswith(names) and k != "entropy_loss"}
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Average the window; a model without routers has no such section."""
        if not trainer.is_global_zero or not self.window or not self.window[-1]:
            return
        mean = {k: sum(entry[k] for entry in self.window) / len(self.window) for k in sorted(self.window[-1])}
        layers = [value for name, value in mean.items() if name.startswith("execution_ratio_layer_")]
        summary = {name: mean[name] for name in ("flip_ratio", "logit_gap", "entropy")}
        update_results(self.run.root, "routing", summary | {"execution_ratio_per_layer": layers})

    def state_dict(self) -> dict[str, Any]:
        """The window, so that a resumed run ends with the same summary."""
        return (
            {
                "window": torch.tensor([list(entry.values()) for entry in self.window]),
                "names": list(self.window[-1]),
            }
            if self.window
            else {}
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the window."""
        if state_dict:
            for values in state_dict["window"].tolist():
                self.window.append(dict(zip(state_dict["names"], values, strict=True)))
