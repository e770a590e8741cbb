"""Training stops at the first number that isn't finite, says where and why, and keeps it out of every file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from qtale_lightning.callbacks import Checkpoints, FiniteNumbers
from qtale_lightning.checkpoints import RunCheckpointIO
from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.finite import NonFiniteError
from qtale_lightning.losses import Losses
from qtale_lightning.module import QTALEModule
from qtale_lightning.run import RunDirectory
from qtale_lightning.stages import export
from tests.objectives import objective


class Damaged(QTALEModule):
    """The tiny model, whose loss is another number in one micro-batch of training, or in validation."""

    value, at, validating = float("nan"), 2, False

    def losses(self, *args: Any) -> Losses:
        found = super().losses(*args)
        loop = self.trainer.fit_loop.epoch_loop
        if self.trainer.validating if self.validating else loop.total_batch_idx == self.at:
            return replace(found, total=found.total + self.value)
        return found


def train(root: Path, module: QTALEModule, accumulate: int = 1, **options: Any) -> None:
    run = RunDirectory(root)
    data = CommonsenseDataModule(
        "facts", batch_size=4, limit_train=28, limit_validation=4, calibration_rows=4
    )
    data.tokenizer = module.tokenizer
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, accumulate_grad_batches=accumulate, val_check_interval=4, default_root_dir=root,
        check_val_every_n_epoch=None, plugins=[RunCheckpointIO(root)],
        callbacks=[FiniteNumbers(), Checkpoints(run, 1)], **options,
    )  # fmt: skip
    trainer.fit(module, data)


def make(**options: Any) -> Damaged:
    return Damaged(name="tiny", router_width=16, **options)


def saved_step(root: Path) -> int:
    return int(torch.load(RunDirectory(root).last, weights_only=True)["global_step"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_isnt_finite_stops_its_step(value: float, tmp_path: Path) -> None:
    module = make()
    module.value = value
    with pytest.raises(NonFiniteError) as stopped:
        train(tmp_path, module)
    message = str(stopped.value)
    assert "the loss isn't finite at step 3 (epoch 0, batch 2: training rows " in message
    assert "the first is 'Question: " in message
    assert "learning rate that is too high (--model.lr, --model.router_lr; now " in message
    assert "--trainer.precision 32-true" in message
    assert saved_step(tmp_path) == 2
    assert all(weight.isfinite().all() for weight in module.parameters())


def test_of_an_accumulated_step_the_micro_batch_is_named(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"at step 2 \(epoch 0, batch 2: "):
        train(tmp_path, make(), accumulate=2)
    assert saved_step(tmp_path) == 1


def test_a_gradient_that_isnt_finite_is_named(tmp_path: Path) -> None:
    module = make()
    module.at = -1

    def overflow(gradient: Tensor) -> Tensor:
        return gradient * (torch.inf if module.trainer.global_step == 1 else 1.0)

    module.configure_model()
    name, weight = next((n, p) for n, p in module.named_parameters() if "lora_B" in n)
    weight.register_hook(overflow)
    with pytest.raises(NonFiniteError) as stopped:
        train(tmp_path, module)
    assert f"the gradient of {name} isn't finite at step 2, though the loss is" in str(stopped.value)


@pytest.mark.parametrize("sanity", [0, 2])
def test_damaged_weights_are_named_before_training(sanity: int, tmp_path: Path) -> None:
    """Not where they crash something: "Expected p_in >= 0" in the sanity check, as it was."""
    module = make()
    module.configure_model()
    with torch.no_grad():
        module.model.get_parameter("model.layers.3.mlp.up_proj.weight")[0, 0] = torch.nan
    with pytest.raises(NonFiniteError) as stopped:
        train(tmp_path, module, num_sanity_val_steps=sanity)
    message = str(stopped.value)
    assert "model.layers.3.mlp.up_proj.weight has NaN or infinity before training" in message
    assert "the base model is damaged" in message
    assert not RunDirectory(tmp_path).last.exists()


def test_a_validation_without_a_finite_loss_chooses_nothing(tmp_path: Path) -> None:
    module = make()
    module.validating = True
    with pytest.raises(NonFiniteError, match=r"val/loss is nan at step 4"):
        train(tmp_path, module, num_sanity_val_steps=0)
    assert not RunDirectory(tmp_path).best.exists()
    assert saved_step(tmp_path) == 3


@pytest.mark.parametrize("method", ["full", "qtale"])
def test_weights_that_arent_finite_are_never_exported(method: str, tmp_path: Path) -> None:
    """Before, the check that merging changed little was false for NaN, and so passed it."""
    module = QTALEModule(name="tiny", router_width=16, **objective(method))
    module.configure_model()
    checkpoint = {name: weight.clone() for name, weight in module.state_dict().items()}
    next(iter(checkpoint.values())).view(-1)[0] = torch.nan
    run = RunDirectory(tmp_path)
    with pytest.raises(NonFiniteError, match="nothing is exported to"):
        export(run, module.fresh(), checkpoint, torch.float32)
    assert not run.model().exists()
