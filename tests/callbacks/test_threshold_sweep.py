"""A budget that isn't met ends a run, but not before its report."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qtale_lightning.callbacks import ThresholdSweep
from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.evaluation.budget import UnmetBudgetError
from qtale_lightning.evaluation.options import SweepOptions
from qtale_lightning.quantization.options import QuantizationOptions
from qtale_lightning.run import RunDirectory


def test_an_unmet_budget_is_said_behind_what_comes_after(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unmet(*_: Any) -> None:
        raise UnmetBudgetError("16 bits: no θ")

    monkeypatch.setattr("qtale_lightning.stages.sweep", unmet)
    callback = ThresholdSweep(RunDirectory(tmp_path), SweepOptions(), QuantizationOptions())
    trainer: Any = SimpleNamespace(is_global_zero=True, datamodule=CommonsenseDataModule())
    module: Any = None
    callback.on_fit_end(trainer, module)
    with pytest.raises(UnmetBudgetError, match="no θ"):
        callback.teardown(trainer, module, "fit")
