"""What a training run leaves of its routers: in results.json, in the checkpoint and on W&B."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from qtale_lightning.callbacks import RoutingMonitor
from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.models.routing import Routing
from qtale_lightning.module import QTALEModule
from qtale_lightning.paths import path_codes
from qtale_lightning.results.store import load_results, update_results
from qtale_lightning.run import RunDirectory
from qtale_lightning.tracking import WandbTracker
from tests.objectives import objective

RECORD: dict[str, dict[str, Any]] = {
    "paths": {"tokens": 9, "distinct": 2, "entropy": 0.5, "entropy_share": 0.4},
    "noisy_paths": {"tokens": 9, "distinct": 4, "entropy": 1.0, "entropy_share": 0.8},
    "logit_gap": {"edges": [-8.0, 0.0, 8.0], "counts": [3, 6]},
    "probability": {"edges": [0.0, 0.5, 1.0], "counts": [3, 6]},
}


def train(root: Path, method: str = "qtale") -> tuple[QTALEModule, CommonsenseDataModule]:
    """Eight steps, validated behind the fourth and the eighth."""
    module = QTALEModule(name="tiny", router_width=16, router_lr=3e-2, **objective(method))
    data = CommonsenseDataModule(
        "facts", batch_size=8, limit_train=64, limit_validation=8, calibration_rows=8
    )
    data.tokenizer = module.tokenizer
    update_results(root, "evaluation", [])
    trainer = L.Trainer(
        max_steps=8, accelerator="cpu", logger=CSVLogger(root), enable_progress_bar=False, default_root_dir=root,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False, val_check_interval=4,
        num_sanity_val_steps=0, callbacks=[RoutingMonitor(RunDirectory(root))],
    )  # fmt: skip
    trainer.fit(module, data)
    return module, data


def test_results_say_how_the_routers_decide_about_held_out_rows(tmp_path: Path) -> None:
    """Recorded by the last validation, whose model is the trained one: its decisions are made again here."""
    module, data = train(tmp_path)
    module.eval()
    codes, counts = [], torch.zeros(64, dtype=torch.long)
    for batch in data.val_dataloader():
        with torch.no_grad():
            module.losses(batch, routing := Routing(), module.target_ratio)
        codes.append(path_codes(routing.stacked_gates()[:, routing.free] > 0.5))
        logits = routing.stacked_logits()[:, routing.free]
        counts += torch.histc(logits[..., 1] - logits[..., 0], 64, -8, 8).long()
    found = load_results(tmp_path)["routing"]
    assert found["paths"]["tokens"] == sum(map(len, codes))
    assert found["paths"]["distinct"] == len(torch.cat(codes).unique(dim=0))
    assert found["noisy_paths"]["distinct"] > found["paths"]["distinct"]
    assert found["histograms"]["logit_gap"]["counts"] == counts.tolist()
    assert sum(found["histograms"]["probability"]["counts"]) == int(counts.sum())
    flips = found["flip_ratio_per_layer"]
    assert flips[:2] == [None, None]  # layers without a router
    # Every layer decides about the same tokens, so the mean over layers is the ratio of all decisions.
    assert np.mean([flip for flip in flips if flip is not None]) == pytest.approx(
        found["flip_ratio"], rel=1e-5
    )


def test_a_model_without_routers_has_no_such_section(tmp_path: Path) -> None:
    train(tmp_path, "full")
    assert "routing" not in load_results(tmp_path)


def test_a_resumed_run_ends_with_what_was_recorded(tmp_path: Path) -> None:
    first = RoutingMonitor(RunDirectory(tmp_path))
    window = {"flip_ratio": 0.25, "logit_gap": 1.5, "entropy": 0.5, "execution_ratio_layer_00": 1.0}
    window |= {"execution_ratio_layer_01": 0.5, "flip_ratio_layer_01": 0.25}
    first.window.append(window)
    first.record = RECORD
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = RoutingMonitor(RunDirectory(tmp_path))
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    trainer: Any = SimpleNamespace(is_global_zero=True)
    second.on_fit_end(trainer, QTALEModule(name="tiny"))
    assert load_results(tmp_path)["routing"] == {
        "flip_ratio": 0.25,
        "logit_gap": 1.5,
        "entropy": 0.5,
        "execution_ratio_per_layer": [1.0, 0.5],
        "flip_ratio_per_layer": [None, 0.25],
        "histograms": {name: RECORD[name] for name in ("logit_gap", "probability")},
        "paths": RECORD["paths"],
        "noisy_paths": RECORD["noisy_paths"],
    }


class Recorder(WandbTracker):
    """The tracker without W&B."""

    def __init__(self) -> None:
        self.logged: list[tuple[Any, int]] = []

    def log_histograms(self, histograms: Any, step: int) -> None:
        self.logged.append((histograms, step))


def test_wandb_gets_the_histograms_of_a_validation(tmp_path: Path) -> None:
    module, monitor, tracker = QTALEModule(name="tiny"), RoutingMonitor(RunDirectory(tmp_path)), Recorder()
    module.routing_record = RECORD
    trainer: Any = SimpleNamespace(loggers=[tracker], global_step=7)
    monitor.on_validation_end(trainer, module)
    histograms = {f"val/{name}": RECORD[name] for name in ("logit_gap", "probability")}
    assert tracker.logged == [(histograms, 7)]
