"""Milliseconds of a decoded token on a GPU, each contender a CUDA graph: what skipping layers is worth there.

    python benchmarks/graphs.py [--model llama2-7b llama3.1-8b] [--layers 32] [--batch 1 8] [--ratios 1 0.75 0.5 0.25]
                                [--seconds 80] [--json FILE]

Layers of the models' shapes with random weights, as many as `--layers` say; embeddings and head are whole. Routers run
in every layer and their time counts; their decisions are replaced, so that each token executes the given share of
layers.

- `dense`: Hugging Face's model with a static cache, its layers compiled by `torch.compile`, the step captured as one
  graph: the peer that counts.
- `static`: our graph of a model that was made without the other layers, and has no routers.
- `bf16`, `int4`: our graph, `models.graph`; `nodes`: with a conditional node around each layer, where PyTorch has them.

The limit is what the weights that must be read take at the speed at which this GPU copies memory, measured in the same
run; caches are left out of it. On a CPU (`--device cpu --quick`) nothing is captured, and the kernels are Triton's
interpreter's, with TRITON_INTERPRET=1: that shows that it runs, and times nothing.
"""

import copy
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from common import claim, interleaved, median_ratio, parser, report, show, write
from latency import decisions, dense_model, routed_model
from torch import Tensor
from transformers import StaticCache

from qtale_lightning.evaluation import cost
from qtale_lightning.models import RoutedCache, RoutedForCausalLM, Routing, graph, route, routed_config
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import round_to_nearest

CONTEXT, STEPS, SETS = (
    64,
    16,
    8,
)  # tokens before, tokens of a run, and sets of decisions that they take in turn
QTALE = 1.28  # its speed-up at half of the FLOPs (the paper)

Run = Callable[[], Any]


def bandwidth(device: str) -> float:
    """Bytes a second that a copy reads and writes."""
    size = 2**30 if device == "cuda" else 2**24
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, 5)["copy"]
    return 2 * size / statistics.median(seconds)


def captured(step: Run, device: str) -> Run:
    """A step as a graph, on a GPU."""
    if device != "cuda":
        return step
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        step()
    return made.replay


def dense(model: Any, batch: int, device: str) -> Run:
    """Hugging Face's model, compiled and captured; every token is written where the first one was."""
    cache = StaticCache(config=model.config, max_cache_len=2 * CONTEXT)
    ids = torch.ones(batch, CONTEXT, dtype=torch.long, device=device)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token, position = ids[:, :1].clone(), torch.full((1, 1), CONTEXT, device=device)
    if device == "cuda":
        for layer in model.model.layers:  # alike: compiled once
            layer.compile(dynamic=False)

    def step() -> None:
        output = model(token, past_key_values=cache, position_ids=position, use_cache=True)
        token.copy_(output.logits[:, -1].argmax(-1, keepdim=True))

    return captured(step, device)


def pruned(model: Any, layers: int) -> RoutedForCausalLM:
    """A model of its first layers, without routers; the weights share memory."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    made = copy.deepcopy(model, shared)
    made.model.layers = made.model.layers[:layers]
    made.config.num_hidden_layers = layers
    return route(made, routed_config(made.config, start_layer=layers)).eval()


def ours(model: RoutedForCausalLM, batch: int, forced: Tensor | None, conditional: bool = False) -> Run:
    """Our graph after a prompt.

    Raises:
        ValueError: The kernels don't take this model.
    """
    stack = graph.stack_of(model, batch, 1024, forced)
    if stack is None:
        raise ValueError("the kernels don't take this model")
    decoder = graph.GraphDecoder(model, stack, conditional=conditional)
    cache, ids = RoutedCache(), torch.ones(batch, CONTEXT, dtype=torch.long, device=model.device)
    output = model(ids, past_key_values=cache, routing=Routing(threshold=0.0), logits_to_keep=1)
    places = torch.full((batch,), CONTEXT, device=model.device)
    decoder.begin(cache, places, output.logits[:, -1], {})
    return decoder.advance


def forced_steps(ratio: float, layers: int, batch: int, device: str) -> tuple[Tensor, float]:
    """Decisions int8 ``(SETS, L, B)``, and the layers that some sequence executes, on average."""
    sets = [decisions(ratio, layers, batch, 1, seed) for seed in range(SETS)]
    forced = torch.stack([torch.stack([one[i].squeeze(1) for i in range(layers)]) for one in sets]).to(
        torch.int8
    )
    return forced.to(device), float(forced.bool().any(-1).float().sum(1).mean())


@torch.no_grad()
def measure(name: str, layers: int, batch: int, args: Namespace) -> list[dict[str, Any]]:
    """Rows of a model at one batch size; a contender that breaks is a row with the reason."""
    base = dense_model(name, layers, args.device)
    speed = bandwidth(args.device)
    model, packed = routed_model(base, name), routed_model(base, name)
    group = 64 if base.config.hidden_size % 128 else 128
    quantize_model(packed, round_to_nearest(uniform(linear_shapes(packed), 4, {}), group))
    per_layer = sum(rows * columns for rows, columns in cost.linear_shapes(model.config).values())
    head, router = (
        2 * model.config.hidden_size * model.config.vocab_size,
        2 * model.config.hidden_size * model.config.router_width,
    )
    runs: dict[tuple[str, float], Run] = {}
    limits: dict[tuple[str, float], float] = {}
    broken: dict[tuple[str, float], str] = {}

    def add(form: str, ratio: float, bytes_: float, make: Callable[[], Run]) -> None:
        limits[form, ratio] = 1e3 * bytes_ / speed
        try:
            run = make()
            run()
            runs[form, ratio] = lambda: [run() for _ in range(STEPS if args.device == "cuda" else 1)]
        except Exception as error:  # the others are worth measuring
            broken[form, ratio] = f"{type(error).__name__}: {error}"[:300]

    add("dense", 1.0, 2 * per_layer * layers + head, partial(dense, base, batch, args.device))
    for ratio in args.ratios:
        forced, executed = forced_steps(ratio, layers, batch, args.device)
        always, width = router * layers + head, (4 + (16 + 8) / group) / 8
        for form, one, bytes_ in (("bf16", model, 2.0), ("int4", packed, width)):
            needed = bytes_ * per_layer * executed + always
            add(form, ratio, needed, partial(ours, one, batch, forced))
            if graph.has_conditional_nodes() and args.device == "cuda":
                add(f"{form}, nodes", ratio, needed, partial(ours, one, batch, forced, conditional=True))
        if (kept := max(1, round(ratio * layers))) < layers:
            shallow = pruned(base, kept)
            add("static", ratio, 2 * per_layer * kept + head, partial(ours, shallow, batch, None))
    seconds = interleaved(runs, args.repeats, warmup=1)
    peer, steps = seconds.get(("dense", 1.0)), STEPS if args.device == "cuda" else 1
    rows = []
    for key, limit in limits.items():
        spent = seconds.get(key)
        own = seconds.get((key[0].split(",")[0], 1.0))
        rows.append({
            "model": f"{name}, {layers} layers", "batch": batch, "form": key[0], "ratio": float(key[1]),
            "ms": 1e3 * statistics.median(spent) / steps if spent else None, "limit ms": limit,
            "of dense": median_ratio(peer, spent) if spent and peer else None,
            "of own at 1": median_ratio(own, spent) if spent and own else None,
            "GB/s": speed / 1e9, "failed": broken.get(key, ""),
        })  # fmt: skip
        show(rows[-1])
    return rows


def claims_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals that these rows speak of: LLaMA-2-7B, one sequence."""
    found = {
        (row["form"], row["ratio"]): row for row in rows if "llama2-7b" in row["model"] and row["batch"] == 1
    }
    claims = []

    def add(what: str, value: Callable[[], float], goal: float, better: str) -> None:
        try:
            claims.append(claim(f"llama2-7b, decode at batch 1: {what}", value(), goal, better))
        except KeyError:  # not measured, or it broke
            return

    def ms(form: str, ratio: float, column: str = "ms") -> float:
        value = found[form, ratio][column]
        if value is None:
            raise KeyError(form)
        return float(value)

    ideal = lambda: ms("bf16", 1.0, "limit ms") / ms("bf16", 0.5, "limit ms")  # noqa: E731
    add(
        "bf16 at 0.5 of the ideal against 1.0",
        lambda: ms("bf16", 1.0) / ms("bf16", 0.5) / ideal(),
        0.9,
        "higher",
    )
    add("bf16 at 1.0 over compiled dense", lambda: ms("bf16", 1.0) / ms("dense", 1.0), 1.05, "lower")
    add(
        "bf16 at 0.5 against compiled dense (QTALE reports it)",
        lambda: ms("dense", 1.0) / ms("bf16", 0.5),
        QTALE,
        "higher",
    )
    add("int4 at 0.5 against compiled dense", lambda: ms("dense", 1.0) / ms("int4", 0.5), 3, "higher")
    add("bf16 at 0.5 over statically pruned", lambda: ms("bf16", 0.5) / ms("static", 0.5), 1.05, "lower")
    return claims


def attempts(args: Namespace) -> Iterator[list[dict[str, Any]]]:
    """Rows of every model and batch, while there is time."""
    started = time.perf_counter()
    for batch in args.batch:
        for name in args.model:
            if args.seconds is None or time.perf_counter() - started < args.seconds:
                yield measure(name, args.layers, batch, args)


def options() -> ArgumentParser:
    """The command line's."""
    made = parser(__doc__)
    made.add_argument("--model", nargs="*", default=["llama2-7b", "llama3.1-8b"])
    made.add_argument("--layers", type=int, default=32)
    made.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    made.add_argument("--ratios", type=float, nargs="*", default=[1.0, 0.75, 0.5, 0.25])
    made.add_argument("--repeats", type=int, default=5)
    made.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, or cpu with --quick"
    )
    made.add_argument("--seconds", type=float, help="no model is begun later")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report; every model is written as soon as it is done."""
    args = options().parse_args(arguments)
    if args.quick:
        args.model, args.layers, args.batch, args.ratios, args.repeats = ["tiny"], 2, [1], [0.5], 1
    done: list[dict[str, Any]] = []
    for rows in attempts(args):
        done += rows
        write("graphs", done, claims_of(done), args.json)
    report("graphs", done, claims_of(done), args.json)


if __name__ == "__main__":
    main()
