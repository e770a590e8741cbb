"""During training: stop at the first number that isn't finite, before it gets into a weight."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from qtale_lightning.data.sampler import ResumableLoader
from qtale_lightning.finite import NonFiniteError, first_non_finite
from qtale_lightning.module import QTALEModule

SHOWN = 8  # rows of a batch that a message names


class FiniteNumbers(Callback):
    """Stops training where a weight, a loss or a gradient has NaN or infinity, and says where and why.

    Gradients are looked at when a step is about to be taken, by their norm, which is that of all devices: all stop
    together. A loss that isn't finite makes them NaN (see the module's ``training_step``), so it needs no look of its
    own. Where float16's gradients are scaled, those that are too large are the scaler's to deal with.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []  # of the step's micro-batches

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse damaged weights before anything is computed with them."""
        self._check_weights(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The same, where a run goes on from a checkpoint, which has no sanity check."""
        self._check_weights(trainer, pl_module)
        self._losses.clear()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Keep the loss of each micro-batch of the step."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Look at the gradients.

        Raises:
            NonFiniteError: They, or a loss, aren't finite.
        """
        losses = self._losses.copy()
        self._losses.clear()
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        if bool((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).isfinite()):
            return
        lost = [
            i for i, loss in enumerate(reversed(losses)) if not loss.isfinite()
        ]  # micro-batches before this one
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if scaled and not trainer.strategy.reduce_boolean_decision(bool(lost), all=False):
            return
        raise NonFiniteError(_message(trainer, pl_module, lost[-1] if lost else None))

    @staticmethod
    def _check_weights(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        name = first_non_finite(pl_module.named_parameters())
        if trainer.strategy.reduce_boolean_decision(name is not None, all=False):
            source = (
                "the checkpoint" if trainer.ckpt_path and _is_trained(pl_module, name) else "the base model"
            )
            raise NonFiniteError(
                f"the weight {name or '(on another device)'} has NaN or infinity before training: {source} is "
                f"damaged. {_remedy(trainer)}"
            )


def _message(trainer: L.Trainer, pl_module: L.LightningModule, back: int | None) -> str:
    """What isn't finite, at which step and in which rows, and what is likely to have made it.

    Args:
        back: How many micro-batches ago the loss was lost, in the same step. None: losses are finite.
    """
    step = trainer.global_step + 1
    if back is None:
        gradients = ((name, p.grad) for name, p in pl_module.named_parameters() if p.grad is not None)
        what = f"the gradient of {first_non_finite(gradients)} isn't finite at step {step}"
        what += ", though this device's loss is" if trainer.world_size > 1 else ", though the loss is"
    else:
        what = f"the loss isn't finite at step {step}{_rows(trainer, pl_module, back)}"
    if (name := first_non_finite(pl_module.named_parameters())) is not None:
        cause = f"the weight {name} has NaN or infinity, so it was damaged while training ran"
    else:
        rates = ", ".join(f"{group['lr']:.3g}" for group in trainer.optimizers[0].param_groups)
        cause = (
            "all weights are finite, so the likely causes are a learning rate that is too high "
            f"(--model.lr, --model.router_lr; now {rates}) or numbers that leave the range of "
            f"--trainer.precision {trainer.precision}"
        )
    return f"{what}: training stops, and no checkpoint has anything of it. {cause[0].upper()}{cause[1:]}."


def _rows(trainer: L.Trainer, pl_module: L.LightningModule, back: int) -> str:
    """Which training rows a micro-batch has: their numbers, and how the first begins."""
    loader = trainer.train_dataloader
    if not isinstance(loader, ResumableLoader):
        return ""
    epoch, now = loader.position()
    batch = now - back  # no step goes over an epoch's end
    rows = loader.order.batches(epoch)[batch]
    shown = ", ".join(map(str, rows[:SHOWN])) + (", …" if len(rows) > SHOWN else "")
    found = f" (epoch {epoch}, batch {batch}: training rows {shown}"
    if isinstance(pl_module, QTALEModule):
        text = pl_module.tokenizer.decode(list(loader.dataset[rows[0]].input_ids), skip_special_tokens=True)
        found += f", the first is {text[:80]!r}"
    return f"{found})"


def _is_trained(pl_module: L.LightningModule, name: str | None) -> bool:
    return name is None or pl_module.get_parameter(name).requires_grad


def _remedy(trainer: L.Trainer) -> str:
    return (
        f"Remove {trainer.ckpt_path}, and the run goes on from the one before it"
        if trainer.ckpt_path
        else "Fetch its files again, or name another with --model.path"
    )
