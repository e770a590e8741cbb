"""After everything: figures, results.md, the summary on the terminal, and the same on W&B."""

import lightning as L
from lightning.pytorch.callbacks import Callback

from qtale_lightning.report import write_report
from qtale_lightning.report.tables import evaluation_frame
from qtale_lightning.results import Results
from qtale_lightning.run import RunDirectory
from qtale_lightning.tracking import WandbTracker


class Report(Callback):
    """Writes the run's report, last of all callbacks.

    Args:
        run: The run's directory.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Local files first: they are the truth, W&B is best effort."""
        if not trainer.is_global_zero:
            return
        self.run.merge_logs()
        results = write_report(self.run.root)
        for logger in trainer.loggers:
            if isinstance(logger, WandbTracker):
                self._publish(logger, results)

    def _publish(self, tracker: WandbTracker, results: Results) -> None:
        """What sweeps optimise comes first: tables and pictures need more of the server."""
        for row in results["selected"]:
            chosen = {key: row[key] for key in ("average", "average_nll", "execution_ratio", "theta")}
            tracker.log_summary({f"selected/{row['bits']}bit/{key}": value for key, value in chosen.items()})
        tracker.log_table("evaluation", evaluation_frame(results))
        for plot in sorted((self.run.root / "plots").glob("*.png")):
            tracker.log_image(f"plots/{plot.stem}", plot)
