"""What is trained: LoRA and routers on a frozen base, declared, saved, checked and merged in one place."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from peft import LoraConfig, LoraModel
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class DroppedOutput(Linear):
    """LoRA as D-LLM's code has it, y = Wx + dropout(B(Ax)) in float32; peft's own drops out of x."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Shape ``(..., out)`` from ``(..., in)``."""
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            down, up = self.lora_A[name].weight, self.lora_B[name].weight
            drop = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
            result = result + _Change.apply(x, down, up, self.scaling[name], drop, result.dtype)
        return result


class _Change(torch.autograd.Function):
    """scaling · dropout(B(Ax)) in float32, where PyTorch's own operations would keep x and the dropout in float32, too.

    With LoRA of every projection that would be half of what a step keeps, and a tenth of its time on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, scaling: float, drop: float, dtype: torch.dtype
    ) -> Tensor:
        ctx.scale = scaling / (1 - drop)
        with torch.autocast(x.device.type, enabled=False):
            low = x.float() @ down.T * ctx.scale
            change = low @ up.T
        keep = _kept(change, drop) if drop else None
        ctx.save_for_backward(x, down, up, low, keep)
        return (change if keep is None else change.mul_(keep)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, low, keep = ctx.saved_tensors
        (grad,) = grads
        grad = grad.float() if keep is None else grad.to(torch.float32, copy=True).mul_(keep)
        with torch.autocast(x.device.type, enabled=False):
            of_low = grad @ up * ctx.scale
            of_x = (of_low @ down).to(x.dtype) if ctx.needs_input_grad[0] else None
            rows = of_low.flatten(0, -2)
            of_down, of_up = rows.T @ x.flatten(0, -2).float(), grad.flatten(0, -2).T @ low.flatten(0, -2)
        return of_x, of_down, of_up, None, None, None


def _kept(x: Tensor, drop: float) -> Tensor:
    """Which numbers of x dropout keeps, 0 or 1 in its shape, with probability 1 − drop."""
    # A CPU multiplies by it five times as fast as by bool.
    keep = torch.empty_like(x, dtype=torch.uint8)
    if not x.is_cpu:
        return keep.bernoulli_(1 - drop)
    # There `bernoulli_` draws one number at a time. Four of 16 bits come out of one draw; drop is right to 2⁻¹⁶.
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    draws = draws.view(torch.int16)[: x.numel()].view_as(x)
    return torch.ge(draws, round(drop * (2**16 - 1)) - 2**15, out=keep)


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float,
    dropout: float,
    dropout_at: Literal["output", "input"],
    init: Literal["normal", "uniform"],
    targets: Sequence[str],
) -> LoraModel:
    """Inject LoRA into the named projections in place (paper: rank 8 on q, k, v); the tuner can merge it again."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # annotated int, only ever divided by the rank
        lora_dropout=dropout,
        init_lora_weights="gaussian" if init == "normal" else True,  # True: nn.Linear's own for A
        target_modules=list(targets),
        bias="none",
    )
    if dropout_at == "output":
        config._register_custom_module({nn.Linear: DroppedOutput})
    return LoraModel(model, {"default": config}, "default")


def mark_trainable(model: nn.Module, everything: bool) -> None:
    """Train what was added only, LoRA, routers and stand-ins, or every weight; in float32 whatever the base's dtype."""
    for name, parameter in model.named_parameters():
        trainable = everything or any(part in name for part in ("lora_", ".router.", ".stand_in."))
        parameter.requires_grad_(trainable)
        if trainable:
            parameter.data = parameter.data.float()


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Name → value of every trainable weight: all that a checkpoint keeps of the model."""
    return {
        name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def load_trainable_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what :func:`trainable_state` kept, in place (ValueError: as :func:`check_trainable_state`)."""
    check_trainable_state(model, state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])


def check_trainable_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse what :func:`trainable_state` kept of another model.

    Raises:
        ValueError: The state is not that of this model and method: names or shapes differ.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if state[name].shape != own[name].shape
    ]
    problems = [
        f"{len(names)} {problem} (first: {names[0]})"
        for problem, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshaped),
        )
        if names
    ]
    if problems:
        raise ValueError(
            "the checkpoint belongs to another model or configuration: of its trainable weights "
            + ", ".join(problems)
            + ". Use the run's own configuration, or start a new run."
        )


def fold_lora(part: nn.Module) -> None:
    """Fold LoRA into the weights of a part of the model, in place. Do it in float32: merging in bf16 drifts."""
    for module in part.modules():
        if isinstance(module, LoraLayer) and not module.merged:
            module.merge(safe_merge=True)


def merge_lora(tuner: LoraModel) -> None:
    """Fold what isn't folded yet, and remove LoRA from the model."""
    fold_lora(tuner.model)
    tuner.unload()
