"""After everything: figures, results.md, the summary on the terminal, and the same on W&B."""

import logging

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from qtale_lightning.report import write_report
from qtale_lightning.report.tables import evaluation_frame
from qtale_lightning.run import RunDirectory

log = logging.getLogger(__name__)


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
            if isinstance(logger, WandbLogger):
                try:
                    frame = evaluation_frame(results)
                    logger.log_table("evaluation", dataframe=frame)
                    for row in results["selected"]:
                        summary = {k: row[k] for k in ("average", "average_nll", "execution_ratio", "theta")}
                        logger.experiment.summary.update(
                            {f"selected/{row['bits']}bit/{k}": v for k, v in summary.items()}
                        )
                    for plot in sorted((self.run.root / "plots").glob("*.png")):
                        logger.log_image(f"plots/{plot.stem}", [str(plot)])
                except Exception as error:  # W&B's failures have many types, and none may cost a finished run
                    log.warning(
                        "W&B did not take the report (%s); it is complete in %s", error, self.run.root
                    )
