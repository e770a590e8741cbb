"""Blocks of a decoder layer, run again as calibration ran them: what AWQ compares in its search for shared scales."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qtale_lightning.quantization.calibration import hooks
from qtale_lightning.quantization.mappings import DecoderLayer

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""A module's positional and keyword arguments."""


@contextmanager
def recorded_calls(
    layer: DecoderLayer, names: Iterable[str], every: int = 1
) -> Iterator[dict[str, list[Call]]]:
    """Keeps every n-th call of some of a layer's modules, by name, while the context is open."""
    calls: dict[str, list[Call]] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        kept = calls[name] = []
        seen = 0

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal seen
            if seen % every == 0:
                kept.append((args, kwargs))
            seen += 1

        return hook

    modules = {name: layer.module.get_submodule(name) for name in names}
    with hooks(m.register_forward_pre_hook(record(name), with_kwargs=True) for name, m in modules.items()):
        yield calls


def unwatched(module: nn.Module, shared: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a module: what watches the original doesn't see its calls. It shares what is given by its `id`."""
    made = copy.deepcopy(module, shared)
    for part in made.modules():
        part._forward_pre_hooks.clear()
        part._forward_hooks.clear()
    return made


class Replay(nn.Module):
    """A copy of a module, to be changed, that repeats the calls which the original got in calibration."""

    def __init__(
        self, module: nn.Module, calls: Sequence[Call], changed: Iterable[str] | None = None
    ) -> None:
        """Copies the weights of the linears that will be changed, by their names in the module; None: all weights."""
        super().__init__()
        own = None if changed is None else {f"{name}.weight" for name in changed}
        shared = {id(p): p for name, p in module.named_parameters() if own is not None and name not in own}
        self.module = unwatched(module, shared)
        self.calls = calls

    def outputs(self) -> Iterator[Tensor]:
        """The output of each call, shape `(…, out)`."""
        for args, kwargs in self.calls:
            output = self.module(*args, **kwargs)
            yield output[0] if isinstance(output, tuple) else output

    def forward(self, *_: Tensor) -> Tensor:
        """The outputs of all calls, shape `(tokens, out)`; the inputs are those of the calls."""
        return flat(self.outputs())


def flat(batches: Iterable[Tensor]) -> Tensor:
    """The tokens of all batches, shape `(tokens, width)` from `(..., width)`."""
    return torch.cat([batch.flatten(0, -2) for batch in batches])
