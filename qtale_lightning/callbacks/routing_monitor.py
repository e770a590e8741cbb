"""During training: how the routers decide, for the report and W&B."""

from collections import deque
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from qtale_lightning.module import QTALEModule
from qtale_lightning.results.store import update_results
from qtale_lightning.run import RunDirectory
from qtale_lightning.tracking import WandbTracker

WINDOW = 50  # micro-batches: long enough to average Gumbel noise out, short enough to be the end of training
STATISTICS = ("flip_ratio", "prediction_error", "logit_gap", "entropy")
EXECUTED, FLIPPED = "execution_ratio_layer_", "flip_ratio_layer_"
HISTOGRAMS = ("logit_gap", "probability")


class RoutingMonitor(Callback):
    """Keeps the last routing statistics that the module logged, and writes ``routing`` of results.json.

    Args:
        run: The run's directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.window: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self.record: dict[str, dict[str, Any]] = {}  # of the last validation, see RoutingDiagnostics

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Read what the module logged for this micro-batch."""
        names = (*STATISTICS, EXECUTED)
        logged = {
            k.removeprefix("train/"): v for k, v in trainer.callback_metrics.items() if k.startswith("train/")
        }
        self.window.append(
            {k: float(v) for k, v in logged.items() if k.startswith(names) and k != "entropy_loss"}
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep what the validation recorded; its histograms go to W&B now, its numbers were logged by the module."""
        assert isinstance(pl_module, QTALEModule)
        if not pl_module.routing_record:
            return
        self.record = pl_module.routing_record
        for logger in trainer.loggers:
            if isinstance(logger, WandbTracker):
                histograms = {f"val/{name}": self.record[name] for name in HISTOGRAMS if name in self.record}
                logger.log_histograms(histograms, trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Average the window, also one of an earlier start; a model that decides nothing has no such section."""
        if not trainer.is_global_zero or not self.window or not self.window[-1]:
            return
        mean = {k: sum(entry[k] for entry in self.window) / len(self.window) for k in self.window[-1]}
        layers = sorted(name for name in mean if name.startswith(EXECUTED))
        summary: dict[str, Any] = {name: mean[name] for name in STATISTICS if name in mean}
        summary["execution_ratio_per_layer"] = [mean[name] for name in layers]
        if "flip_ratio" in mean:
            summary["flip_ratio_per_layer"] = [mean.get(name.replace(EXECUTED, FLIPPED)) for name in layers]
        if histograms := {name: self.record[name] for name in HISTOGRAMS if name in self.record}:
            summary["histograms"] = histograms
        summary |= {name: self.record[name] for name in ("paths", "noisy_paths") if name in self.record}
        update_results(self.run.root, "routing", summary)

    def state_dict(self) -> dict[str, Any]:
        """The window and the record, so that a resumed run ends with the same summary."""
        if not self.window:
            return {}
        return {
            "window": torch.tensor([list(entry.values()) for entry in self.window]),
            "names": list(self.window[-1]),
            "record": self.record,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        if state_dict:
            for values in state_dict["window"].tolist():
                self.window.append(dict(zip(state_dict["names"], values, strict=True)))
            self.record = state_dict.get("record", {})
