"""A training step doesn't wait for the device: nothing of it is read on the host but what is logged.

On a CPU the operations that would wait are seen where PyTorch dispatches them: numbers read from tensors, places of
true ones, and indices that are masks. On a GPU PyTorch itself raises. A teacher of self-distillation does wait: it is
packed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qtale_lightning.models import Routing
from qtale_lightning.models.packing import Packing, compact
from qtale_lightning.module import ANSWERS, QTALEModule
from tests.test_module import make_batch, make_module, stepping

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.equal,
    aten.is_nonzero,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}

MOD = {"method": "mod", "lambda_ratio": 0.0, "lambda_entropy": 0.0, "lambda_prediction": 1.0}


class HostWaits(TorchDispatchMode):
    """Names of operations that wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        masks = [x for x in tree_leaves(args[1:2]) if isinstance(x, Tensor) and x.dtype == torch.bool]
        if packet in WAITS or (packet in INDEXING and masks):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def refused_on_gpu(device: str) -> Iterator[None]:
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def step(
    module: QTALEModule, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, device: str
) -> list[str]:
    """What a step waits for, forward and backward."""
    for name in ("log", "log_dict"):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    batch = {name: value.to(device) for name, value in batch.items()}
    with refused_on_gpu(device), HostWaits() as waits:
        module.training_step(batch, 0).backward()
    return waits.found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("options", [{}, MOD, {"ratio_budget": "all"}])
def test_a_training_step_waits_for_nothing(
    options: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = stepping(make_module(**options), 10, 20).to(device)
    batch = module.on_before_batch_transfer(make_batch(), 0)
    assert step(module, batch, monkeypatch, device) == []


def test_what_waits_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the places of answers aren't found before; and masks and numbers."""
    module, batch = stepping(make_module(), 10, 20), make_batch()
    assert ANSWERS not in batch
    assert step(module, batch, monkeypatch, "cpu") == ["aten.nonzero.default"]
    x = torch.arange(3.0)
    with HostWaits() as waits:
        x[x > 1], float(x[0]), bool(x.sum() > 1)
    assert len(waits.found) == 3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_places_without_waiting(share: float, device: str) -> None:
    chosen = (torch.rand(50, generator=torch.Generator().manual_seed(0)) < share).to(device)
    count = int(chosen.sum())
    with refused_on_gpu(device), HostWaits() as waits:
        places = compact(chosen, count)
    assert waits.found == []
    assert torch.equal(places, chosen.nonzero().squeeze(1))


@pytest.mark.cuda
def test_a_packing_on_a_gpu_is_that_of_the_cpu() -> None:
    executing = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    found, expected = Packing.of(executing.cuda()), Packing.of(executing)
    assert found.counts == expected.counts
    assert torch.equal(found.index.cpu(), expected.index)  # type: ignore[union-attr,arg-type]
    assert found.ends.tolist() == [0, *torch.tensor(found.counts).cumsum(0).tolist()]  # type: ignore[union-attr]


def test_the_step_is_the_same_with_places_that_were_found_before() -> None:
    module, batch = make_module(), make_batch()
    torch.manual_seed(0)
    expected = module.losses(batch, Routing(), 0.5).total
    torch.manual_seed(0)
    assert torch.equal(
        module.losses(module.on_before_batch_transfer(batch, 0), Routing(), 0.5).total, expected
    )
