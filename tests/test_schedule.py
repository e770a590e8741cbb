"""How long a training is: held to what Lightning's Trainer does with the same numbers."""

from itertools import product

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from qtale_lightning.schedule import Schedule


class Counter(L.LightningModule):
    """Counts batches and validations."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.batches, self.validations = 0, 0

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.batches += 1
        return self.layer(batch).sum()

    def validation_step(self, batch: torch.Tensor) -> None:
        self.validations += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.parametrize(
    ("epoch", "accumulate", "max_steps", "max_epochs"),
    [
        pytest.param(7, 1, 5, None, id="within an epoch"),
        pytest.param(7, 3, 8, None, id="an epoch's last step is shorter"),
        pytest.param(7, 64, 3, None, id="a step is more than an epoch"),
        pytest.param(4, 2, -1, 3, id="epochs"),
        pytest.param(5, 2, 100, 2, id="epochs end first"),
        pytest.param(5, 2, 4, 2, id="steps end first"),
    ],
)
def test_batches_steps_and_validations_are_the_trainers(
    epoch: int, accumulate: int, max_steps: int, max_epochs: int | None
) -> None:
    schedule = Schedule(epoch, accumulate, max_steps, max_epochs)
    module, rows = Counter(), DataLoader(torch.ones(epoch, 1))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=max_epochs,
        accumulate_grad_batches=accumulate,
        val_check_interval=schedule.interval(2),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, rows, DataLoader(torch.ones(1, 1)))
    assert (module.batches, trainer.global_step) == (schedule.batches, schedule.steps)
    assert module.validations in (2, 3)


def test_there_is_a_validation_however_short_a_training_is() -> None:
    for epoch, accumulate, steps, validations in product((1, 3), (1, 2, 64), (1, 2, 9), (1, 4, 200)):
        schedule = Schedule(epoch, accumulate, steps, None)
        assert 1 <= schedule.interval(validations) <= schedule.batches
