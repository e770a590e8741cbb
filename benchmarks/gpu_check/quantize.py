"""The stage that quantizes: AWQ's search on layers of LLaMA-2-7B's shape, its seconds and its memory."""

import time
from typing import Any

import torch
from latency import dense_model

from gpu_check.stages import Context
from qtale_lightning.quantization import awq
from qtale_lightning.quantization.calibration import padded_batches
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.precision import uniform

SEQUENCES, LENGTH = 128, 64


@torch.no_grad()
def quantize(context: Context) -> dict[str, Any]:
    """Seconds a layer at 4 and 3 bits, and bytes beyond the model's."""
    name, sequences = ("tiny", 4) if context.quick else ("llama2-7b", SEQUENCES)
    model = dense_model(name, 1, context.device)
    ids = torch.randint(
        10, model.config.vocab_size, (sequences, LENGTH), generator=torch.Generator().manual_seed(0)
    )
    batches = padded_batches(ids.tolist(), context.device)
    found: dict[str, Any] = {"model": name, "tokens": ids.numel(), "rows": []}
    for bits in (4,) if context.quick else (4, 4, 3):  # the first one compiles
        before = _memory(context.device)
        started = time.perf_counter()
        awq.search(model, batches, [uniform(linear_shapes(model), bits, {})], 64 if context.quick else 128)
        if context.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        found["rows"].append(
            {"bits": bits, "seconds a layer": seconds, "more bytes": _peak(context.device) - before}
        )
        context.save(found)
    return found


def _memory(device: str) -> int:
    """Bytes of tensors now; what is most from here on is counted anew."""
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0
