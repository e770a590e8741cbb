"""What a routed layer costs in each family: its own forward with our attention, and where there is one the fused layer.

    python benchmarks/families.py [--model smollm2-135m gemma3-270m …] [--layers 8] [--repeats 5] [--json FILE]

Every family's routed layer runs Hugging Face's forward, with an attention that is registered with transformers'
`AttentionInterface` ("own forward"). Families that are LLaMA's but for what they declare have a faster one ("fused",
`models/fused.py`). Both have the same weights and decisions; the peer is Hugging Face's dense model. Times
are those of a whole model: a prompt batch of 16 × 128 tokens, and decoding one sequence.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from common import interleaved, median_ratio, parser, report, show
from latency import STEPS, decisions, decode, dense_model, ideal_decode, ideal_prefill, prefill, routed_model

from qtale_lightning.architectures import ARCHITECTURES, architecture_of, known_model
from qtale_lightning.models import Routing

MODELS = ("smollm2-135m", "qwen2.5-0.5b", "qwen3-0.6b", "gemma3-270m")
REAL = {"smollm2-135m"}  # whose weights are loaded: times depend on shapes alone


@contextmanager
def own_forward(family: str) -> Iterator[None]:
    """Models of a family are routed without the fused layer meanwhile."""
    declared = ARCHITECTURES[family]
    ARCHITECTURES[family] = replace(declared, fused=False)
    try:
        yield
    finally:
        ARCHITECTURES[family] = declared


@torch.no_grad()
def measure(name: str, args: Any) -> list[dict[str, Any]]:
    """All runs of one model."""
    family, known = known_model(name)
    layers = None if name in REAL else min(args.layers, known.config["num_hidden_layers"])
    dense = dense_model(name, layers)
    config, count = dense.config, dense.config.num_hidden_layers
    with own_forward(family.model_type):
        ours = {"own forward": routed_model(dense, name)}
    if architecture_of(config).fused:
        ours["fused"] = routed_model(dense, name)
    rows = []
    for kind, batch, length in (("prefill", *args.prefill), ("decode", 1, 1)):
        torch.manual_seed(0)
        ids = torch.randint(10, config.vocab_size, (batch, length))
        whole = prefill(dense, ids, None) if kind == "prefill" else decode(dense, batch, None)
        contenders: dict[tuple[str, float], Callable[[], Any]] = {("dense", 1.0): whole}
        ideal: dict[float, float] = {}
        for ratio in args.ratios:
            steps = [decisions(ratio, count, batch, length, seed) for seed in range(STEPS)]
            for form, model in ours.items():
                contenders[form, ratio] = (
                    prefill(model, ids, lambda f=steps[0]: Routing(execution="packed", forced=f))  # type: ignore[misc]
                    if kind == "prefill"
                    else decode(model, batch, steps)
                )
            ideal[ratio] = (
                ideal_prefill(ours["own forward"].config, ratio, length, batch)
                if kind == "prefill"
                else ideal_decode(ours["own forward"].config, steps, dense.dtype)
            )
        seconds = interleaved(contenders, args.repeats, warmup=1)
        for (form, ratio), values in seconds.items():
            own = seconds.get(("own forward", ratio), values)
            rows.append(
                {"model": f"{name}, {count} layers", "run": f"{kind} {batch} × {length}", "form": form}
                | {"ratio": ratio, "ms": 1e3 * statistics.median(values)}
                | {"over dense": median_ratio(seconds["dense", 1.0], values), "ideal": ideal.get(ratio, 1.0)}
                | {"over own forward": median_ratio(own, values)}
            )
            show(rows[-1])
    return rows


def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument("--model", nargs="*", default=[*MODELS])
    options.add_argument("--layers", type=int, default=8, help="of models whose weights are random, at most")
    options.add_argument("--ratios", type=float, nargs="*", default=[1.0, 0.5])
    options.add_argument("--repeats", type=int, default=5)
    args = options.parse_args()
    args.prefill = (16, 128)
    if args.quick:
        args.model, args.layers, args.repeats, args.prefill = ["tiny", "gemma3-270m"], 1, 2, (2, 16)
    report("families", [row for name in args.model for row in measure(name, args)], [], args.json)


if __name__ == "__main__":
    main()
