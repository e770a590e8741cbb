"""The main job on two processes: DDP on the CPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.data.sampler import LengthBatchSampler
from qtale_lightning.models.sources import load_tokenizer
from qtale_lightning.results.store import load_results

pytestmark = pytest.mark.slow


def trained_tokens(replicas: int, batches: int) -> int:
    """Unpadded tokens of the first batches of four on every device."""
    data = CommonsenseDataModule("facts", batch_size=4, limit_validation=12, calibration_rows=8)
    data.tokenizer = load_tokenizer("tiny", None)
    data.setup()
    lengths = [len(example.input_ids) for example in data.train_dataloader().dataset]
    ranks = [
        LengthBatchSampler(lengths, 4, 0, replicas, rank).batches(0)[:batches] for rank in range(replicas)
    ]
    return sum(lengths[row] for own in ranks for batch in own for row in batch)


def test_two_processes_train_and_one_reports(options: Callable[..., list[str]], tmp_path: Path) -> None:
    """Four micro-batches of four on each of two devices are 32 examples; scoring afterwards needs no other process.

    With every tool for training: both begin with the same stand-ins, and raise the same multiplier.
    """
    more = (
        *("--data.batch_size", "4", "--data.limit_validation", "12", "--data.calibration_rows", "8"),
        *(
            "--trainer.max_steps",
            "4",
            "--validations",
            "1",
            "--quantize.bits",
            "[]",
            "--sweep.thresholds",
            "[0.5]",
        ),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"),
        *("--model.ratio_ascent", "0.5", "--model.ratio_schedule", "0", "--model.stages", "routers-first"),
        *("--model.distillation", "1"),
        *("--model.noise_bits", "3", "--model.keep_kv", "true", "--model.stand_in_rank", "4"),
        *("--wandb", "disabled", "--out", str(tmp_path)),
    )
    command = [sys.executable, "-m", "qtale_lightning", "fit", *options("tiny", "qtale", *more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = load_results(tmp_path / "tiny-qtale-facts-s0")
    assert results["train"]["steps"] == 4
    assert results["train"]["final_losses"]["lambda_ratio"] > 0
    assert results["train"]["examples"] == 32
    assert results["train"]["tokens"] == trained_tokens(replicas=2, batches=4)
    assert [row["split"] for row in results["evaluation"]] == ["calibration", "validation"]
    assert results["selected"][0]["bits"] == 16
    # The paths of both devices' held-out rows, all tokens of each but the two reserved ones.
    data = CommonsenseDataModule("facts", calibration_rows=8)
    data.tokenizer = load_tokenizer("tiny", None)
    data.setup()
    tokens = sum(int(batch["attention_mask"].sum()) for batch in data.val_dataloader())
    assert results["routing"]["paths"]["tokens"] == tokens - 2 * 8
