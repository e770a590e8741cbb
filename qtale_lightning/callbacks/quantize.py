"""After training: AWQ at each of the asked bit widths."""

from collections.abc import Mapping

import lightning as L
from lightning.pytorch.callbacks import Callback

from qtale_lightning import stages
from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.quantization.awq import MIN_TOKENS
from qtale_lightning.quantization.rtn import check_quantizable
from qtale_lightning.run import RunDirectory


class AWQQuantization(Callback):
    """Quantizes the exported model with AWQ, calibrated on training sequences with routing on.

    Args:
        bits: Weight precisions, each from 2 to 8.
        group_size: Weights that share a scale; it must divide every linear's input width (paper: AWQ's 128).
        sequences: Training sequences (prompt and answer) to calibrate on.
    """

    def __init__(self, bits: tuple[int, ...] = (4, 3), group_size: int = 128, sequences: int = 128) -> None:
        if sequences < 1:
            raise ValueError(f"--quantize.sequences {sequences} must be positive")
        self.bits, self.group_size, self.sequences = tuple(bits), group_size, sequences
        self.run: RunDirectory | None = None

    def check(self, shapes: Mapping[str, tuple[int, int]], reserved_tokens: int) -> None:
        """Refuse what can't be quantized (ValueError).

        Args:
            shapes: The linears' (out, in).
            reserved_tokens: Tokens of a sequence that execute every layer: all that a layer sees for certain.
        """
        if self.bits and self.sequences * reserved_tokens < MIN_TOKENS:
            raise ValueError(
                f"--quantize.sequences {self.sequences} calibrates a layer that routers always skip on "
                f"{self.sequences * reserved_tokens} tokens, but the search needs {MIN_TOKENS}: give at least "
                f"{-(-MIN_TOKENS // reserved_tokens)}"
            )
        for bits in self.bits:
            try:
                check_quantizable(shapes, bits, self.group_size)
            except ValueError as error:
                raise ValueError(
                    f"--quantize.bits {bits}, --quantize.group_size {self.group_size}: {error}"
                ) from None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Works on the run directory; the live module isn't touched."""
        if self.run is None or not trainer.is_global_zero:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, CommonsenseDataModule)
        stages.quantize(self.run, data, self.bits, self.group_size, self.sequences)
