"""What an optimizer is given: weights and routers, each with a learning rate, and vectors apart, which don't decay."""

from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module, lr: float, router_lr: float, weight_decay: float, decays_all: bool
) -> list[dict[str, Any]]:
    """Groups of trainable parameters as PyTorch's optimizers take them, each with a ``name``.

    They are ``weights`` and ``routers``, as far as the model has them; and ``weights-vectors`` and ``routers-vectors``,
    biases and norms, which have no weight decay, unless all decays.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind, rate = ("routers", router_lr) if ".router." in name else ("weights", lr)
        decay = weight_decay
        if parameter.ndim < 2 and not decays_all:
            kind, decay = f"{kind}-vectors", 0.0
        made = {"name": kind, "params": [], "lr": rate, "weight_decay": decay}
        groups.setdefault(kind, made)["params"].append(parameter)
    return [*groups.values()]
