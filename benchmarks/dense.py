"""Products of a few tokens with dense weights: `cpu.dense_linear` beside PyTorch's (oneDNN, MKL).

    OMP_NUM_THREADS=1 python benchmarks/dense.py [--cpu-seconds] [--json FILE]

Weights come from memory: as many different ones as make up 64 MB are multiplied one after the other. Medians.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import interleaved, parser, report, show
from torch import Tensor
from torch.nn.functional import linear

from qtale_lightning import cpu

SHAPES = {
    "SmolLM2's head": (49152, 576),
    "its q, k and v": (960, 576),
    "its down": (576, 1536),
    "7B's up": (11008, 4096),
}
TOKENS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)
BYTES = 2**26


def multiply(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: list[Tensor]) -> None:
    """All of the weights, once."""
    for weight in weights:
        product(x, weight)


@torch.no_grad()
def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument(
        "--cpu-seconds",
        action="store_true",
        help="of the process: for one thread on a machine that others use",
    )
    options.add_argument("--repeats", type=int, default=9)
    args = options.parse_args()
    shapes = {"quick": (64, 32)} if args.quick else SHAPES
    clock = time.process_time if args.cpu_seconds else time.perf_counter
    rows: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, (outputs, inputs) in shapes.items():
            count = 2 if args.quick else max(1, BYTES // (outputs * inputs * dtype.itemsize))
            weights = [torch.randn(outputs, inputs, dtype=dtype) for _ in range(count)]
            for tokens in TOKENS:
                x = torch.randn(tokens, inputs, dtype=dtype)
                ways = {"PyTorch": linear, "ours": cpu.dense_linear}
                runs = {way: partial(multiply, product, x, weights) for way, product in ways.items()}
                found = interleaved(runs, args.repeats, clock=clock)
                ms = {way: 1e3 * statistics.median(seconds) / count for way, seconds in found.items()}
                rows.append({"weights": name, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens})
                rows[-1] |= {f"{way} ms": value for way, value in ms.items()}
                rows[-1]["ours / PyTorch"] = ms["ours"] / ms["PyTorch"]
                show(rows[-1])
    report("dense", rows, [], args.json)


if __name__ == "__main__":
    main()
