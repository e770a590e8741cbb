"""Seconds of prefill and decode at forced execution ratios: ours against dense Hugging Face and D-LLM's way.

    python benchmarks/latency.py [--model smollm2-135m llama2-7b] [--layers 8] [--ratios 1 0.75 0.5 0.25] [--json FILE]
                                 [--device cuda] [--seconds 90]

`smollm2-135m` is the real model. `llama2-7b` has layers of that shape, as many as memory (`--layers`) or time
(`--seconds`) allow, with random weights; embeddings and head are whole. Routers run in every layer and their time
counts; their decisions are replaced, so that each layer executes the given share of a prompt's tokens, and each decoded
token the given share of layers.

- All compute in bfloat16 where the device has instructions for it, else in float32.
- `dense`: Hugging Face's model, SDPA attention and its own cache. `masked`: every token of every layer is computed and
  mixed, as D-LLM does in prefill. `bf16` or `fp32`, and `int4`: packed execution, with the weights of that form.
- On a GPU also, in prefill: `sizes known`, packed execution that is told how many tokens execute each layer, for which
  it waits for the device otherwise; and `static`, Hugging Face's model without the other layers.
- Prefill of `B × T` prompts ends in the logits of the last position; decode continues from 64 cached tokens.
- The ideal speed-up is 1 / share of work left, embeddings and head included. In prefill the work is counted FLOPs; ours
  computes its last layer's queries and MLP for the last position only, which the ideal counts too (so it passes 1 at
  ratio 1). In decode it is the bytes of weights that must be read: of a layer that any sequence of the batch executes,
  all of them.
"""

import copy
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from common import claim, instructions, interleaved, median_ratio, parser, report, show, write
from torch import Tensor
from transformers import PreTrainedModel

from qtale_lightning.evaluation import cost
from qtale_lightning.models import RoutedCache, RoutedConfig, RoutedForCausalLM, Routing, route, routed_config
from qtale_lightning.models.families import classes_of
from qtale_lightning.models.packing import Packing
from qtale_lightning.models.routing import OfUnits
from qtale_lightning.models.sources import base_config, load_base
from qtale_lightning.precision import native_bfloat16
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import round_to_nearest

ROUTER_WIDTH = {"smollm2-135m": 128, "tiny": 32}  # as experiments/models sets it; others have D-LLM's 512
PREFILL = ((16, 128), (1, 1024))
DECODE = (1, 8)
CONTEXT, STEPS = 64, 8
FEW_LAYERS = 4  # measured first where time is limited, to see how many it allows
SHARE = 0.8  # of the time that is left, for the next attempt: what takes no layers' time is part of the last one's


def dense_model(name: str, layers: int | None, device: str = "cpu") -> PreTrainedModel:
    """The dense model in what the device computes fast: real weights, or random layers of a preset's shape."""
    dtype = torch.bfloat16 if native_bfloat16(device) else torch.float32
    if layers is None:
        return load_base(name, dtype=dtype).to(device).eval()  # type: ignore[arg-type]
    config = base_config(name, layers)
    with torch.device("meta"):
        model = classes_of(config).plain(config)
    model = model.to(dtype).to_empty(device=device).eval()
    noise = torch.randn(2**22, dtype=dtype, device=device).mul_(0.02)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(noise)):
            flat[start : start + len(noise)] = noise[: len(flat) - start]
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffers were empty, too
    return model


def routed_model(dense: PreTrainedModel, name: str) -> RoutedForCausalLM:
    """A routed model with the dense one's weights, a router in every layer; the weights share memory."""
    shared = {id(parameter): parameter for parameter in dense.parameters()}
    options = {"start_layer": 0, "router_width": ROUTER_WIDTH.get(name, 512)}
    config = routed_config(dense.config, **options)
    return route(copy.deepcopy(dense, shared), config).eval()


def decisions(ratio: float, layers: int, batch: int, length: int, seed: int, device: str = "cpu") -> OfUnits:
    """Which tokens execute each layer: the same share in every layer (prompts) or for every token (decode).

    A prompt's reserved tokens, which execute whatever is decided, are among its share.
    """
    generator = torch.Generator().manual_seed(seed)
    if length > 1:
        order = torch.rand(layers, batch, length, generator=generator)
        order[:, :, : RoutedConfig.reserved_tokens] = -1
        ranks = order.flatten(1).argsort(-1).argsort(-1)
        chosen = (ranks < ratio * batch * length).view(layers, batch, length)
    else:
        order = torch.rand(batch, layers, generator=generator).argsort(-1).argsort(-1)
        chosen = (order < ratio * layers).T[:, :, None]
    return OfUnits(range(layers), chosen.to(device))


def prefill(model: Any, ids: Tensor, routing: Callable[[], Routing] | None) -> Callable[[], Any]:
    """A prompt's forward pass, to the logits of its last position."""
    if routing is None:
        return lambda: model(ids, use_cache=True, logits_to_keep=1)
    cached = routing().execution != "masked"
    return lambda: model(ids, use_cache=cached, routing=routing(), logits_to_keep=1)


def sizes_known(run: Callable[[], Any]) -> Callable[[], Any]:
    """A pass whose packings were made before, by the same pass: nothing in it waits for the device."""
    made: list[Packing] = []
    of = Packing.of

    def record(executing: Tensor, align: bool = False) -> Packing:
        made.append(of(executing, align))
        return made[-1]

    with mock.patch.object(Packing, "of", record):
        run()

    def again() -> Any:
        with mock.patch.object(Packing, "of", side_effect=made):
            return run()

    return again


def pruned(dense: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The model of its first layers; the weights share memory."""
    made: Any = copy.deepcopy(dense, {id(parameter): parameter for parameter in dense.parameters()})
    made.model.layers = made.model.layers[:layers]
    made.config.num_hidden_layers = layers
    return made


def decode(model: Any, batch: int, routings: Sequence[Mapping[int, Tensor]] | None) -> Callable[[], Any]:
    """`STEPS` tokens after `CONTEXT` cached ones; the cache grows from call to call."""
    ids = torch.randint(10, model.config.vocab_size, (batch, CONTEXT), device=model.device)
    if routings is None:
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    else:
        cache = RoutedCache()
        model(ids, past_key_values=cache, routing=Routing(threshold=0.0), logits_to_keep=1)
    token = ids[:, :1]

    def run() -> None:
        for step in range(STEPS):
            extra = {} if routings is None else {"routing": Routing(forced=routings[step])}
            model(token, past_key_values=cache, use_cache=True, **extra)

    return run


def ideal_prefill(config: Any, ratio: float, length: int, batch: int) -> float:
    """The dense model's counted FLOPs over those that are left; the head runs once a prompt."""
    layers = config.num_hidden_layers

    def flops(share: float) -> float:
        body = cost.token_flops(config, [share] * layers, (length + 1) / 2, head=False)
        body -= layers * cost.router_flops(config)  # not work that the dense model has
        return batch * (length * body + cost.head_flops(config))

    asked_only = sum(
        2 * rows * columns
        for name, (rows, columns) in cost.linear_shapes(config).items()
        if name not in ("k_proj", "v_proj")
    )
    return flops(1.0) / (flops(ratio) - ratio * batch * (length - 1) * asked_only)


def ideal_decode(
    config: Any, routings: Sequence[Mapping[int, Tensor]], dtype: torch.dtype, bits: int | None = None
) -> float:
    """Dense weight bytes over those that packed execution must read: of layers that any sequence executes.

    Args:
        dtype: of the dense model's weights, and of every head.
        bits: of a layer's weights in packed execution; None: the dense model's.
    """
    layer = sum(rows * columns for rows, columns in cost.linear_shapes(config).values())
    head = dtype.itemsize * config.hidden_size * config.vocab_size
    executed = statistics.mean(sum(bool(chosen.any()) for chosen in step.values()) for step in routings)
    width = dtype.itemsize if bits is None else (bits + (16 + bits) / 64) / 8
    return (dtype.itemsize * layer * config.num_hidden_layers + head) / (width * layer * executed + head)


@torch.no_grad()  # as generate() does
def measure(name: str, layers: int | None, args: Any) -> list[dict[str, Any]]:
    """All scenarios of one model."""
    dense = dense_model(name, layers, args.device)
    plain = "bf16" if dense.dtype == torch.bfloat16 else "fp32"
    ours = {plain: routed_model(dense, name), "int4": routed_model(dense, name)}
    group = 64 if dense.config.hidden_size % 128 else 128
    quantize_model(ours["int4"], round_to_nearest(uniform(linear_shapes(ours["int4"]), 4, {}), group))
    config, count = ours[plain].config, dense.config.num_hidden_layers
    scenarios = [("prefill", batch, length) for batch, length in args.prefill] + [
        ("decode", b, 1) for b in args.decode
    ]
    rows = []
    for kind, batch, length in scenarios:
        torch.manual_seed(0)
        ids = torch.randint(10, config.vocab_size, (batch, length), device=args.device)
        contenders: dict[tuple[str, float], Callable[[], Any]] = {}
        ideal: dict[tuple[str, float], float] = {}
        contenders["dense", 1.0] = (
            prefill(dense, ids, None) if kind == "prefill" else decode(dense, batch, None)
        )
        for ratio in args.ratios:
            steps = [decisions(ratio, count, batch, length, seed, args.device) for seed in range(STEPS)]
            if kind == "prefill":
                make = {
                    execution: (lambda e=execution, forced=steps[0]: Routing(execution=e, forced=forced))
                    for execution in ("masked", "packed")
                }
                if ratio == min(args.ratios):
                    contenders["masked", ratio] = prefill(ours[plain], ids, make["masked"])
                for form, model in ours.items():
                    contenders[form, ratio] = prefill(model, ids, make["packed"])
                    ideal[form, ratio] = ideal_prefill(config, ratio, length, batch)
                if args.peers and ratio < 1:
                    known = f"{plain}, sizes known"
                    contenders[known, ratio] = sizes_known(prefill(ours[plain], ids, make["packed"]))
                    ideal[known, ratio] = ideal[plain, ratio]
                    kept = max(1, round(ratio * count))
                    contenders["static", kept / count] = prefill(pruned(dense, kept), ids, None)
                    ideal["static", kept / count] = count / kept  # the head is little
            else:
                for form, model in ours.items():
                    contenders[form, ratio] = decode(model, batch, steps)
                    ideal[form, ratio] = ideal_decode(
                        config, steps, dense.dtype, 4 if form == "int4" else None
                    )
        seconds = interleaved(contenders, args.repeats, warmup=1)
        baseline = seconds["dense", 1.0]
        tokens = batch * (length if kind == "prefill" else STEPS)
        for key, values in seconds.items():
            form, ratio = key
            speedup = median_ratio(baseline, values)
            best = ideal.get((form, float(ratio)), 1.0)
            rows.append(
                {"model": name + (f", {count} layers" if layers else ""), "run": f"{kind} {batch} × {length}"}
                | {"form": form, "ratio": float(ratio), "ms": 1e3 * statistics.median(values)}
                | {"tokens/s": tokens / statistics.median(values), "speed-up": speedup, "ideal": best}
                | {
                    "of ideal": speedup / best,
                    "instructions": instructions() if args.device == "cpu" else "GPU",
                }
            )
            show(rows[-1])
    return rows


def attempts(name: str, args: Namespace) -> Iterator[list[dict[str, Any]]]:
    """Rows of a model: once, or of few layers first and then of as many as `--seconds` leave time for."""
    if name in ROUTER_WIDTH:
        yield measure(name, None, args)
        return
    started, layers = (
        time.perf_counter(),
        args.layers if args.seconds is None else min(FEW_LAYERS, args.layers),
    )
    while True:
        before = time.perf_counter()
        yield measure(name, layers, args)
        if args.seconds is None:
            return
        now = time.perf_counter()
        affordable = int(SHARE * layers * (args.seconds - (now - started)) / (now - before))
        if (more := min(args.layers, affordable)) <= layers:
            return
        layers = more


def options() -> ArgumentParser:
    """The command line's."""
    made = parser(__doc__)
    made.add_argument("--model", nargs="*", default=["smollm2-135m", "llama2-7b"])
    made.add_argument(
        "--layers", type=int, default=16, help="layers of models that aren't smollm2-135m or tiny, at most"
    )
    made.add_argument("--ratios", type=float, nargs="*", default=[1.0, 0.75, 0.5, 0.25])
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--device", default="cpu", help="cpu, or a GPU: cuda")
    made.add_argument(
        "--seconds", type=float, help="time for each such model: fewer layers where it is short"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report; every attempt is written as soon as it is done."""
    args = options().parse_args(arguments)
    args.prefill, args.decode, args.peers = PREFILL, DECODE, args.quick or args.device == "cuda"
    if args.quick:
        args.model, args.repeats, args.ratios = ["tiny"], 2, [1.0, 0.5]
        args.prefill, args.decode = ((2, 16),), (1, 2)
    done: list[dict[str, Any]] = []
    for name in args.model:
        for rows in attempts(name, args):
            if args.seconds is not None:
                write("latency", [*done, *rows], claims_of([*done, *rows]), args.json)
        done += rows
    report("latency", done, claims_of(done), args.json)


def claims_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The goals that these rows speak of."""
    found = {(row["model"].split(",")[0], row["run"], row["form"], row["ratio"]): row for row in rows}
    plain = "fp32" if any(row["form"] == "fp32" for row in rows) else "bf16"
    claims = []
    for name, run, form, ratio, column, goal in (
        ("llama2-7b", "prefill 16 × 128", plain, 0.5, "of ideal", 0.95),
        ("llama2-7b", "decode 1 × 1", plain, 0.5, "of ideal", 0.9),
        ("smollm2-135m", "decode 1 × 1", plain, 0.5, "of ideal", 0.85),
        ("llama2-7b", "prefill 16 × 128", plain, 1.0, "speed-up", 1 / 1.05),
        ("llama2-7b", "decode 1 × 1", plain, 1.0, "speed-up", 1 / 1.05),
        ("smollm2-135m", "prefill 16 × 128", plain, 1.0, "speed-up", 1 / 1.05),
        ("smollm2-135m", "decode 1 × 1", plain, 1.0, "speed-up", 1 / 1.05),
        ("llama2-7b", "decode 1 × 1", "int4", 0.5, "speed-up", 5),
    ):
        if (name, run, form, ratio) in found:
            what = f"{name}, {run}, {form}, ratio {ratio:g}: {column}"
            claims.append(claim(what, found[name, run, form, ratio][column], goal, "higher"))
    for name, run, form, ratio in found:
        other = found.get((name, run, f"{form}, sizes known", ratio))
        if other is not None and name in ("llama2-7b", "llama3.1-8b"):
            what = f"{name}, {run}, ratio {ratio:g}: time over that with sizes known"
            claims.append(claim(what, found[name, run, form, ratio]["ms"] / other["ms"], 1.03, "lower"))
    return claims


if __name__ == "__main__":
    main()
