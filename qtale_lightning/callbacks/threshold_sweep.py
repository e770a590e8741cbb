"""After training: accuracy and cost of every precision at every threshold."""

import lightning as L
from lightning.pytorch.callbacks import Callback

from qtale_lightning import stages
from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.evaluation.threshold import Rule, SweepOptions
from qtale_lightning.quantization.options import QuantizationOptions
from qtale_lightning.run import RunDirectory


class ThresholdSweep(Callback):
    """Scores each precision × each θ, and selects θ on held-out training questions.

    Args:
        thresholds: The grid of θ; 0.5 is D-LLM's, 0 executes everything. The budget rules don't use it.
        rule: one-standard-error: the fewest layers within one standard error of the grid's best accuracy. tolerance:
            the fewest layers whose accuracy isn't significantly below that of full execution (θ = 0) on the same
            questions. budget: the θ that executes this share of all layers. layer-budget: the same with a θ for each
            layer; it takes two passes more for every layer.
        budgets: Execution ratios for the budget rules, each of which gets its own θ, e.g. '[0.7,0.8]'.
        margin: Accuracy that the rule tolerance lets go, shown by the 95 % interval: 0.01 is one point. None: any loss
            that isn't significant, so the more of it, the fewer the questions.
    """

    def __init__(
        self,
        thresholds: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1, 0.03, 0.005),
        rule: Rule = "one-standard-error",
        budgets: tuple[float, ...] = (),
        margin: float | None = None,
    ) -> None:
        self.options = SweepOptions(tuple(thresholds), rule, tuple(budgets), margin)
        self.run: RunDirectory | None = None
        self.quantization: QuantizationOptions | None = None  # whose precisions are swept

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Works on the run directory; the live module isn't touched."""
        if self.run is None or self.quantization is None or not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, CommonsenseDataModule)
        stages.sweep(self.run, data, self.quantization.bits, self.quantization.engine, self.options)
