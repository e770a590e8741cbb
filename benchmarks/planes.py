"""Weights of 4, 3 and 2 bits: one linear that is read from memory, and a decoded token, over those of int4.

    python benchmarks/planes.py [--model smollm2-135m] [--tokens 1 4] [--cpu-seconds] [--repeats 15] [--json FILE]

A linear of LLaMA-2-7B's widths, in groups of 128, as many copies in turn as no cache holds: int4 as models of 4 bits
run it, the same for tokens that are rounded to 8 bits, and planes of bits (`cpu/planes.h`), which models of 3 and 2
bits run from, and nested ones that can be switched at 4, too. "limit": bytes of int4 weights over those that are read.
A decoded token is one of the model, rounded to nearest, all layers executed, behind 64 others (as in latency.py): its
head is in bfloat16, and counts in the limit.
"""

import statistics
import time
from functools import partial
from typing import Any

import torch
from common import claim, interleaved, median_ratio, parser, report
from latency import STEPS, decode
from linear import BYTES, Copies

from qtale_lightning import cpu
from qtale_lightning.models import route, routed_config
from qtale_lightning.models.sources import load_base
from qtale_lightning.precision import native_bfloat16
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.int4_cpu import Int4Strips
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.planes import PlaneStrips
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import round_to_nearest
from qtale_lightning.quantization.rtn import Scheme, quantize

WIDTHS = (4, 3, 2)
GOALS = {3: 1.0, 2: 1.27}  # a decoded token over int4's: of ik_llama.cpp's 3 and 2 bits


def bytes_of(kernel: Any) -> int:
    """Bytes that a product reads of a weight."""
    return sum(part.nbytes for part in kernel.operands(rounded=False))


def linears(outputs: int, inputs: int, of_all: int) -> dict[str, Copies]:
    """Contenders of one shape."""
    weight = torch.randn(outputs, inputs) / inputs**0.5
    found: dict[str, Any] = {}
    for bits in WIDTHS:
        quantized = quantize(weight, Scheme(bits, 128))
        if bits == 4:
            found["int4"] = Int4Strips(quantized)
        found[f"planes of {bits}"] = PlaneStrips(quantized, bits)
    return {name: Copies(kernel, bytes_of(kernel), of_all) for name, kernel in found.items()}


def quantized_model(name: str, bits: int, nested: bool, group_size: int) -> Any:
    """A model rounded to nearest; by planes, or as models of 4 bits run, by int4."""
    dtype = torch.bfloat16 if native_bfloat16() else torch.float32
    base = load_base(name, dtype=dtype)
    model = route(base, routed_config(base.config, start_layer=base.config.num_hidden_layers)).eval()
    quantize_model(model, round_to_nearest(uniform(linear_shapes(model), bits, {}), group_size))
    for part in model.modules():
        if nested and hasattr(part, "quantized"):
            part.kernel, part.device = PlaneStrips(part.quantized(), bits), torch.device("cpu")
    return model


@torch.inference_mode()
def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--tokens", type=int, nargs="*", default=[1, 4])
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument(
        "--cpu-seconds", action="store_true", help="of the process, where others share the machine"
    )
    args = options.parse_args()
    shape, of_all, group_size = (4096, 4096), BYTES // 2, 64
    if args.quick:
        args.model, args.tokens, args.repeats, shape, of_all, group_size = "tiny", [1], 2, (256, 512), 1, 32
    if not cpu.available():
        print("skipped: our operations weren't built here")
        return
    clock = time.process_time if args.cpu_seconds else time.perf_counter
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []

    def row(what: str, name: str, seconds: dict[str, list[float]], limit: float, of_one: int) -> None:
        rows.append(
            {
                "measured": what,
                "weights": name,
                "ms": 1e3 * statistics.median(seconds[name]) / of_one,
                "over int4": median_ratio(seconds["int4"], seconds[name]),
                "limit": limit,
            }
        )

    contenders = linears(*shape, of_all)
    sizes = {name: bytes_of(copies.next()) for name, copies in contenders.items()}
    for tokens in args.tokens:
        x = torch.randn(tokens, shape[1]).to(torch.bfloat16 if native_bfloat16() else torch.float32)
        runs: dict[str, Any] = {
            name: partial(lambda copies, x: copies.next()(x), copies, x)
            for name, copies in contenders.items()
        }
        int4s = contenders["int4"]
        runs["int4, tokens in 8 bits"] = partial(lambda copies, x: copies.next().by_rounded(x), int4s, x)
        seconds = interleaved(runs, args.repeats, clock=clock)
        for name in runs:
            what = f"{shape[0]}×{shape[1]}, {tokens} token(s)"
            row(what, name, seconds, sizes["int4"] / sizes.get(name, sizes["int4"]), 1)
    del contenders, runs

    models = {"int4": quantized_model(args.model, 4, False, group_size)}
    models |= {f"planes of {bits}": quantized_model(args.model, bits, True, group_size) for bits in WIDTHS}
    every = [dict[int, torch.Tensor]() for _ in range(STEPS)]
    steps = {name: decode(model, 1, every) for name, model in models.items()}
    seconds = interleaved(steps, max(2, args.repeats // 2), clock=clock)
    read = {name: _read(model) for name, model in models.items()}
    for name in models:
        row("a decoded token", name, seconds, read["int4"] / read[name], STEPS)
    claims = [
        claim(
            f"{one['weights']} bits, {one['measured']}, speed over int4's", one["over int4"], goal, "higher"
        )
        for one in rows
        for bits, goal in GOALS.items()
        if one["weights"] == f"planes of {bits}"
    ]
    report("planes", rows, claims, args.json)


def _read(model: Any) -> int:
    """Bytes of weights that a decoded token reads: of the layers' linears, and the head."""
    kernels = [part.kernel for part in model.modules() if hasattr(part, "quantized")]
    return sum(map(bytes_of, kernels)) + model.lm_head.weight.nbytes


if __name__ == "__main__":
    main()
