"""What a router costs: its share of a routed layer's time, and what its bfloat16 product decides otherwise.

    python benchmarks/router.py [--widths 64 128 256 512] [--run RUN --data FOLDER] [--json FILE]

A layer of each hidden width (SmolLM2-135M's, LLaMA-3.2-1B's, LLaMA-2-7B's shape, random weights in bfloat16) computes
all tokens of one sequence without a cache, beside routers that get the same bfloat16 states: by float32 arithmetic,
as in training, and by the wide product in bfloat16, as in inference (`routing/router.py`). Weights stay in the caches
that they fit in. The counted share is that of the FLOPs, `evaluation/cost.py`.

With a finished run and the folder of the rows, the share of decisions that the two arithmetics take differently: the
float32 routers decide, the bfloat16 ones see the very same hidden states, since the decisions are forced on them.
"""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import claim, interleaved, median_ratio, parser, report
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.evaluation import cost
from qtale_lightning.models import RoutedForCausalLM, Routing, route, routed_config
from qtale_lightning.models.attention import Packed
from qtale_lightning.models.packing import Packing
from qtale_lightning.models.sources import base_config, load_base, load_tokenizer
from qtale_lightning.quantization.calibration import padded_batches
from qtale_lightning.routing.router import Router, execute_probability
from qtale_lightning.run import RunDirectory
from qtale_lightning.stages import load_exported

MODELS = ("smollm2-135m", "llama3.2-1b", "llama2-7b")
ARITHMETIC = ("float32", "bfloat16")


def one_layer(name: str) -> RoutedForCausalLM:
    """A preset's model with one decoder layer, a small vocabulary and random weights in bfloat16."""
    config = base_config(name)
    config.num_hidden_layers, config.vocab_size = 1, 8
    routed = {"start_layer": 0, "router_width": 1}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return AutoModelForCausalLM.from_config(routed_config(config, **routed)).eval()
    finally:
        torch.set_default_dtype(default)


def in_float32(router: Router, hidden: Tensor) -> Tensor:
    """What the router makes of float32 states: all of it by float32 arithmetic."""
    return router(hidden.float())


@torch.inference_mode()
def shares(name: str, widths: list[int], tokens: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each router width: seconds of a layer and of both arithmetics of a router, in the same rounds."""
    model = one_layer(name)
    config, layer = model.config, model.model.layers[0]
    hidden = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16)
    rotary = model.model.rotary_emb(hidden, torch.arange(tokens)[None])
    attend = Packed(Packing((tokens,)), None)
    contenders: dict[tuple[str, int], Callable[[], Any]] = {
        ("layer", 0): partial(layer.execute, hidden, rotary, attend)
    }
    for width in widths:
        with torch.inference_mode(False):  # weights made in it have no version, and are multiplied in float32
            router = Router(config.hidden_size, width).eval()
        contenders["float32", width] = partial(in_float32, router, hidden)
        contenders["bfloat16", width] = partial(router, hidden)
    seconds = interleaved(contenders, repeats)
    rows = []
    for width in widths:
        config.router_width = width
        counted = cost.router_flops(config)
        whole = counted + cost.layer_flops(config, (tokens + 1) / 2)
        row: dict[str, Any] = {"hidden": config.hidden_size, "router width": width, "tokens": tokens}
        row |= {"layer ms": 1e3 * statistics.median(seconds["layer", 0])}
        row |= {f"{kind} ms": 1e3 * statistics.median(seconds[kind, width]) for kind in ARITHMETIC}
        for kind in ARITHMETIC:
            row[f"{kind} %"] = 100 / (1 + median_ratio(seconds["layer", 0], seconds[kind, width]))
        rows.append(row | {"counted %": 100 * counted / whole})
    return rows


def probabilities(routing: Routing) -> Tensor:
    """p(execute) of the tokens that a router decides about, ``(routed layers, tokens)``."""
    return execute_probability(routing.stacked_logits())[:, routing.free]


@torch.no_grad()
def differing(model: RoutedForCausalLM, batches: list[Any], theta: float) -> tuple[float, float, int]:
    """Share of decisions that bfloat16 takes differently, mean |Δp(execute)|, and the number of decisions."""
    routers = [layer.router for layer in model.model.layers if layer.router is not None]
    decisions, flips, moved = 0, 0, 0.0
    for batch in batches:
        exact = Routing(threshold=theta)
        for router in routers:
            router.train()  # float32
        model(**batch, use_cache=False, routing=exact, logits_to_keep=1)
        for router in routers:
            router.eval()
        low = Routing(threshold=theta, forced=exact.gates)
        model(**batch, use_cache=False, routing=low, logits_to_keep=1)
        one, other = probabilities(exact), probabilities(low)
        decisions += one.numel()
        flips += int(((one >= theta) != (other >= theta)).sum())
        moved += float((one - other).abs().sum())
    return flips / decisions, moved / decisions, decisions


def encoded(tokenizer: Any, tasks: str, root: Path | None, questions: int) -> list[Any]:
    """Batches of validation prompts with their gold answers."""
    data = CommonsenseDataModule(tasks=tasks, root=str(root) if root else None, limit_validation=questions)
    data.tokenizer = tokenizer
    data.setup("fit")
    asked = data.questions("validation")
    return padded_batches([q.contexts[q.label] + q.continuations[q.label] for q in asked])


def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument("--widths", type=int, nargs="*", default=[64, 128, 256, 512])
    options.add_argument("--tokens", type=int, nargs="*", default=[1, 2048])
    options.add_argument("--repeats", type=int, default=11)
    options.add_argument("--run", type=Path, help="directory of a finished run with routers")
    options.add_argument("--data", type=Path, help="folder of <task>/train.jsonl and validation.jsonl")
    options.add_argument("--tasks", default="csqa")
    options.add_argument("--questions", type=int, default=50, help="validation questions of each task")
    options.add_argument("--thresholds", type=float, nargs="*", default=[0.5, 0.3])
    args = options.parse_args()
    models: tuple[str, ...] = MODELS
    if args.quick:
        models, args.repeats, args.widths, args.tokens, args.tasks = ("tiny",), 3, [32], [1, 64], "facts"
    torch.manual_seed(0)
    rows = []
    for name in models:
        for tokens in args.tokens:
            rows += shares(name, args.widths, tokens, args.repeats)
    model: RoutedForCausalLM | None = None
    if args.quick:
        base = load_base("tiny", dtype=torch.bfloat16)
        routed = {"start_layer": 2, "router_width": 32}
        model = route(base, routed_config(base.config, **routed)).eval()
        batches = encoded(load_tokenizer("tiny"), "facts", None, 4)
    elif args.run is not None and args.data is not None:
        run = RunDirectory(args.run)
        model = load_exported(run)
        batches = encoded(AutoTokenizer.from_pretrained(run.model()), args.tasks, args.data, args.questions)
    else:
        print(
            "decisions are not compared: that needs a finished run (--run) and the folder of its rows (--data)"
        )
    claims = []
    for theta in args.thresholds:
        if model is None:
            break
        share, moved, count = differing(model, batches, theta)
        print(f"θ = {theta:g}: {share:.3%} of {count:,} decisions differ, mean |Δp(execute)| {moved:.2g}")
        claims.append(
            claim(f"share of decisions that bfloat16 takes differently, θ = {theta:g}", share, 0.01, "lower")
        )
    report("router", rows, claims, args.json)


if __name__ == "__main__":
    main()
