"""After training: quantization at each of the asked precisions."""

import lightning as L
from lightning.pytorch.callbacks import Callback

from qtale_lightning import stages
from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.quantization.options import Engine, QuantizationOptions
from qtale_lightning.run import RunDirectory


class AWQQuantization(Callback):
    """Quantizes the exported model, calibrated on training sequences with routing on.

    Args:
        bits: Weight precisions from 2 to 8: a whole number for all linears, or a fraction such as 3.5, an average that
            is spent where measured errors are largest (engine native).
        group_size: Weights that share a scale; it must divide every linear's input width (paper: AWQ's 128).
        engine: native: AWQ's search from second moments. autoawq: the AutoAWQ package's search. rtn: round to nearest.
        symmetric: Levels symmetric around zero; AWQ's are not.
        patterns: Other widths by pattern of linears' names, e.g. '{"*.down_proj": 8, "model.layers.0.*": 8}'.
        sequences: Training sequences (prompt and answer) to calibrate on.
        refit_norm: Fit the final norm, which isn't quantized, to what rounding did to the layers before it (engine
            native). AWQ alone has no such step.
    """

    def __init__(
        self,
        bits: tuple[int | float, ...] = (4, 3),
        group_size: int = 128,
        engine: Engine = "native",
        symmetric: bool = False,
        patterns: dict[str, int] | None = None,
        sequences: int = 128,
        refit_norm: bool = True,
    ) -> None:
        self.options = QuantizationOptions(
            tuple(bits), group_size, engine, symmetric, dict(patterns or {}), sequences, refit_norm
        )
        self.run: RunDirectory | None = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Works on the run directory; the live module isn't touched."""
        if self.run is None or not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, CommonsenseDataModule)
        stages.quantize(self.run, data, self.options)
