"""What a search costs: seconds, processor time and memory; and the memory of one layer, to compare it with."""

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qtale_lightning.models import RoutedForCausalLM, route, routed_config
from qtale_lightning.models.families import classes_of
from qtale_lightning.models.sources import base_config
from qtale_lightning.quantization.mappings import decoder_layers
from qtale_lightning.quantization.options import QuantizationOptions
from quantizers.searching import search


@dataclass(frozen=True)
class Cost:
    """Of a search.

    Attributes:
        seconds: By the clock.
        processor: Seconds of all threads: what a machine that others use still tells.
        grown: Bytes by which the process grew at most.
    """

    seconds: float = 0.0
    processor: float = 0.0
    grown: int = 0


def resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def measured(run: Callable[[], Any]) -> tuple[Any, Cost]:
    """A call's result and cost."""
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still held would hide growth
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, processor = time.perf_counter(), time.process_time()
    try:
        result = run()
    finally:
        took = time.perf_counter() - started, time.process_time() - processor
        done.set()
        watcher.join()
    return result, Cost(*took, max(0, peak - before))


def layer_bytes(model: RoutedForCausalLM) -> int:
    """One layer in float32: its linears' weights, and the second moments of its four inputs."""
    layer = decoder_layers(model)[0]
    weights = sum(linear.weight.numel() for linear in layer.linears.values())
    inputs = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    return 4 * (weights + sum(layer.linears[name].in_features ** 2 for name in inputs))


def memory_of(name: str, group_size: int) -> tuple[float, float]:
    """Extra bytes of a native search, and the limit, on one layer of a preset's shape: both in MB."""
    config = base_config(name, layers=1)
    options = {"start_layer": 1}
    model = route(classes_of(config).plain(config), routed_config(config, **options))
    model = model.to(torch.bfloat16).eval()  # type: ignore[arg-type]
    batches = [{"input_ids": torch.randint(config.vocab_size, (8, 128))} for _ in range(4)]
    _, cost = measured(partial(search, model, batches, QuantizationOptions(group_size=group_size), 4))
    return cost.grown / 1e6, layer_bytes(model) / 1e6
