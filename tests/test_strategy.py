"""fsdp's checkpoints: what Lightning would leave out in silence is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from qtale_lightning.strategy import FSDP2Strategy, resolve_strategy


def test_only_fsdp_is_replaced() -> None:
    assert isinstance(resolve_strategy("fsdp"), FSDP2Strategy)
    assert resolve_strategy("ddp") == "ddp"


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({}, "2 missing"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "more": torch.zeros(1)}, "1 unexpected"),
        ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, r"weight \(2, 4\) instead of \(2, 3\)"),
    ],
    ids=["missing", "unexpected", "misshaped"],
)
def test_a_checkpoint_of_another_model(tmp_path: Path, saved: dict[str, torch.Tensor], words: str) -> None:
    torch.save({"state_dict": saved}, tmp_path / "last.ckpt")
    strategy = FSDP2Strategy()
    strategy._lightning_module = nn.Linear(3, 2)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=words):
        strategy.load_checkpoint(tmp_path / "last.ckpt")
