"""An exported model, the dtype that it is loaded in to compute with it, and a disk without room for it."""

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from qtale_lightning import precision, stages
from qtale_lightning.module import QTALEModule
from qtale_lightning.run import RunDirectory


def test_a_stored_model_computes_in_what_is_fast(
    make_run: Callable[..., RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exported in bfloat16, and packed: float32 without instructions for it, bfloat16 with them, and so on disk."""
    small = ("--data.limit_train", "64", "--data.calibration_rows", "8", "--quantize.engine", "rtn")
    monkeypatch.setattr(precision, "native_bfloat16", lambda device="cpu": False)
    run = make_run(tmp_path, "qtale", *small, "--quantize.bits", "[4]", dtype=torch.bfloat16)
    for folder in (run.model(), run.model(4, "rtn")):
        assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    for native, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(precision, "native_bfloat16", lambda device="cpu", native=native: native)
        for bits in (16, 4):
            model = stages.load_exported(run, bits, "rtn")
            assert model.dtype == model.lm_head.weight.dtype == dtype
            with torch.no_grad():
                assert model(torch.tensor([[5, 6, 7]])).logits.dtype == dtype


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A limit to a file's size, as the system enforces it, stands for the disk's end."""
    run = RunDirectory(tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
        with pytest.raises(OSError, match=rf"(large|space).*{run.model()}"):
            stages.export(run, QTALEModule(name="tiny", router_width=16), None, torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(run.root.glob("*"))
    stages.export(run, QTALEModule(name="tiny", router_width=16), None, torch.float32)
    assert (run.model() / "model.safetensors").is_file()
