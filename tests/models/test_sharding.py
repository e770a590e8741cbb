"""Layers sharded over two processes compute and learn what one process does."""

import os
import socket
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from qtale_lightning.models.sharding import shard
from qtale_lightning.models.sources import load_base
from qtale_lightning.module import QTALEModule

Gates = Literal["layer", "sublayer"]
KINDS: tuple[Gates, ...] = ("layer", "sublayer")


def routed(gates: Gates) -> QTALEModule:
    """A tiny routed model with a frozen bfloat16 base, and float32 LoRA and routers."""
    module = QTALEModule(name="tiny", router_width=32, gates=gates)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module.attach(load_base("tiny", dtype=torch.bfloat16))
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "lora_B" in name:  # zero at first, so that LoRA's other half would have no gradient
                weight.fill_(0.01)
    return module


def gradients(module: QTALEModule, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the whole loss, whole and averaged over processes; Gumbel noise is the same in every call."""
    from qtale_lightning.models.routing import Routing

    torch.manual_seed(1)
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}
    with torch.autocast("cpu", torch.bfloat16):
        losses = module.losses(batch, routing := Routing(), target=0.5)
    assert len(routing.stacked_shares()) == 4, "the layers recorded their decisions elsewhere"
    losses.total.backward()
    found = {"loss": losses.total.detach()}
    for name, weight in module.named_parameters():
        if weight.grad is not None:
            grad = weight.grad
            found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def compare(rank: int, port: int, result: str) -> None:
    """One of two processes: the same rows on both, so that the average is what a single process has."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = torch.randint(3, 700, (2, 12), generator=torch.Generator().manual_seed(0))
    found = {}
    for gates in KINDS:
        alone = gradients(routed(gates), rows)
        module = routed(gates)
        shard(module.model, init_device_mesh("cpu", (2,)))
        sharded = sum(isinstance(weight, DTensor) for weight in module.parameters())
        found[gates] = alone, gradients(module, rows), sharded
    if rank == 0:
        torch.save(found, result)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = tmp_path / "result.pt"
    mp.spawn(compare, (port, str(result)), nprocs=2)
    for routers, gates in enumerate(KINDS, start=1):
        alone, together, sharded = torch.load(result, weights_only=True)[gates]
        assert alone.keys() == together.keys()
        assert sum(".router." in name for name in alone) == 20 * routers
        assert sum("lora_" in name for name in alone) == 36
        # The 7 linears of every layer's base have no gradient but are sharded, too; norms aren't.
        assert sharded == 6 * 7 + 36 + 20 * routers
        for name, value in alone.items():
            # The same products in the same order; averaging two equal numbers is exact.
            torch.testing.assert_close(together[name], value, rtol=0, atol=0)


def test_a_base_that_is_trained_isnt_sharded() -> None:
    module = QTALEModule(name="tiny", router_width=32, train_all=True)
    module.configure_model()
    with pytest.raises(ValueError, match=r"--model\.train_all"):
        shard(module.model, None)  # type: ignore[arg-type]  # refused before it is looked at
