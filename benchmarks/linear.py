"""The int4 linear against `nn.Linear` in bfloat16 and float32 at LLaMA-2-7B's widths: tokens a second.

    python benchmarks/linear.py [--tokens 1 8 24 64 512] [--repeats 15] [--json FILE]

`int4` is what a quantized model runs. Its two ways are measured beside it, to see that it chooses well: the kernel
and blocks dequantized one by one (for many tokens, where PyTorch has AMX). So are the kernel for each instruction set
that this processor has (in bfloat16 where that has bfloat16 products, else in float32, as a model computes there),
tokens in 8 bits, and PyTorch's int4 kernel, which runs where our own operations can't be built.
The limit is the larger of two times measured here in the same run: reading the int4 weights at this machine's
bandwidth, and the products at the speed of a large matrix product. Where a processor has no bfloat16 products, models
compute in float32: so does int4 here, and many tokens, which would take minutes, aren't multiplied in bfloat16.
"""

import copy
import itertools
import math
import statistics
import time
from functools import partial
from typing import Any

import torch
from common import claim, interleaved, median_ratio, parser, report
from torch import nn

from qtale_lightning import cpu
from qtale_lightning.precision import instruction_sets, native_bfloat16
from qtale_lightning.quantization.int4_cpu import CROSSOVER_TOKENS, Int4CPU, Int4Strips
from qtale_lightning.quantization.kernels import choose_kernel
from qtale_lightning.quantization.rtn import Scheme, quantize

SHAPES = {"q_proj": (4096, 4096), "gate_proj": (11008, 4096), "down_proj": (4096, 11008)}  # (out, in)
GROUP_SIZE = 128
BYTES = 2**29 + 2**27  # of a contender's weights that take turns: more than any cache holds


class Copies:
    """As many copies of a linear as don't fit into a cache, used in turn, as a model's layers are."""

    def __init__(self, one: Any, size: int, of_all: int = BYTES) -> None:
        """Copies of one linear of `size` bytes, `of_all` bytes together."""
        count = math.ceil(of_all / size)
        self._all = itertools.cycle([one, *(copy.deepcopy(one) for _ in range(count - 1))])

    def next(self) -> Any:
        """The next copy."""
        return next(self._all)


def bandwidth(values: int, repeats: int) -> float:
    """Bytes a second that a sum over float32 values reads."""
    data = torch.ones(values)
    return data.numel() * 4 / _median(lambda: data.sum(), repeats)


def arithmetic(width: int, repeats: int, dtype: torch.dtype) -> float:
    """FLOPs a second of a matrix product of width³."""
    one = torch.randn(width, width, dtype=dtype)
    return 2 * width**3 / _median(lambda: one @ one, repeats)


def by_instructions(of_one: Any, int4s: Copies, x: torch.Tensor) -> torch.Tensor:
    """The kernel by the operations for one instruction set."""
    weight = int4s.next()
    return of_one.int4_linear.default(x, weight.packed, weight.scales, weight.zeros)


def _median(run: Any, repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


@torch.inference_mode()
def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 24, 64, 512])
    options.add_argument("--repeats", type=int, default=15)
    args = options.parse_args()
    shapes, values, width = SHAPES, 2**28, 2048
    if args.quick:
        shapes, args.repeats, args.tokens = {"q_proj": (512, 512)}, 3, [1, 64]
        values, width = 2**20, 256
    torch.manual_seed(0)
    dtype, dense = (torch.bfloat16, "bf16") if native_bfloat16() else (torch.float32, "float32")
    read, compute = bandwidth(values, args.repeats), arithmetic(width, args.repeats, dtype)
    print(
        f"{read / 1e9:.1f} GB/s read, {compute / 1e9:.0f} GFLOP/s in {dense}, {torch.get_num_threads()} threads"
    )
    rows = []
    operations = {name: cpu.operations(name) for name in (instruction_sets() if cpu.available() else ())}
    for name, (outputs, inputs) in shapes.items():
        weight = torch.randn(outputs, inputs) / inputs**0.5
        quantized = quantize(weight, Scheme(4, GROUP_SIZE))
        int4 = choose_kernel(quantized)
        if not isinstance(int4, Int4Strips) or not Int4CPU.supports(quantized):
            print("skipped: our operations weren't built here, or PyTorch's int4 kernel has no known layout")
            return
        peer = Int4CPU(quantized)
        low = nn.Linear(inputs, outputs, bias=False).to(torch.bfloat16)
        full = nn.Linear(inputs, outputs, bias=False)
        for linear in (low, full):
            linear.weight.copy_(weight)
        of_all = 1 if args.quick else BYTES
        int4s = Copies(int4, int4.packed.numel(), of_all)
        peers = Copies(peer, peer.packed.numel(), of_all)
        lows, fulls = (Copies(one, one.weight.nbytes, of_all) for one in (low, full))
        for tokens in args.tokens:
            x = torch.randn(tokens, inputs)
            given = x.to(dtype)
            contenders = {
                "bf16": partial(lambda lows, x: lows.next()(x), lows, x.bfloat16()),
                "float32": partial(lambda fulls, x: fulls.next()(x), fulls, x),
                "int4": partial(lambda int4s, x: int4s.next()(x), int4s, given),
                "8 bits": partial(lambda int4s, x: int4s.next().by_rounded(x), int4s, given),
                "blocks": partial(lambda int4s, x: int4s.next().by_blocks(x), int4s, given),
                "PyTorch": partial(lambda peers, x: peers.next().by_kernel(x), peers, x.bfloat16()),
            }
            for name_of, of_one in operations.items():
                takes = x.bfloat16() if name_of == "avx512_bf16" else x
                contenders[name_of] = partial(by_instructions, of_one, int4s, takes)
            if tokens > 2 * CROSSOVER_TOKENS:  # seconds a call
                del contenders["PyTorch"]
                if dense != "bf16":
                    del contenders["bf16"]
            seconds = interleaved(contenders, args.repeats)
            size = int4.packed.nbytes + 3 * int4.scales.numel()  # 16 bits of a scale, 8 of a zero point
            limit = max(size / read, 2 * tokens * outputs * inputs / compute)
            medians = {key: statistics.median(values) for key, values in seconds.items()}
            rows.append(
                {"linear": f"{name} {outputs}×{inputs}", "tokens": tokens}
                | {
                    f"{key} tokens/s": tokens / medians[key] if key in medians else ""
                    for key in ("float32", "bf16", "int4")
                }
                | {"limit tokens/s": tokens / limit, "of limit": limit / medians["int4"]}
                | {
                    f"over {key}": median_ratio(seconds[key], seconds["int4"]) if key in seconds else ""
                    for key in ("bf16", "float32")
                }
                | {
                    f"{way} ms": 1e3 * medians[way] if way in medians else ""
                    for way in ("8 bits", "blocks", "PyTorch")
                }
                | {f"{way} of read": size / read / medians[way] for way in operations}
                | {
                    f"{way} over dense": median_ratio(
                        seconds["bf16" if way == "avx512_bf16" else "float32"], seconds[way]
                    )
                    for way in operations
                }
            )
    claims = []
    for tokens, goal in ((min(args.tokens), 2.0), (max(args.tokens), 1.0)):
        slowest = min(row[f"over {dense}"] for row in rows if row["tokens"] == tokens)
        claims.append(claim(f"int4 over {dense}, {tokens} tokens, slowest shape", slowest, goal, "higher"))
    for way in operations:
        for tokens, what, goal in ((min(args.tokens), "of read", 0.8), (max(args.tokens), "over dense", 1.0)):
            slowest = min(row[f"{way} {what}"] for row in rows if row["tokens"] == tokens)
            claims.append(claim(f"{way}: {what}, {tokens} tokens, slowest shape", slowest, goal, "higher"))
    report("linear", rows, claims, args.json)


if __name__ == "__main__":
    main()
