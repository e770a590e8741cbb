"""Where a decoded token's milliseconds go: `generate`, the model's call and its parts alone, at forced ratios.

    python benchmarks/decode.py [--model smollm2-135m] [--ratios 1 0.5] [--batch 1 8] [--forms bf16 int4] [--json FILE]
                                [--functions 25]

From 64 cached tokens, 16 tokens a round; routers run in every layer, their decisions are replaced so that each token
executes the given share of layers (as in latency.py). Milliseconds a token (of all sequences together), medians:

- `generate`: Hugging Face's greedy `generate()` of 17 new tokens less that of one, which is the prompt's.
- `model`: the model's call and an argmax alone. What `generate` has more is Hugging Face's loop.
- `linears`, `routers`, `operations`, `head`: these parts alone, as often as a token needs them, called as the layers'
  modules call them; operations (norms, rotation, attention, gated activation) straight from PyTorch's dispatcher.
- `python`: `model` less its parts: what is left are PyTorch's small operations, modules, cache and Python.

Each form is measured with the layers' modules in Python (`layers`) and with all layers in one call (`one call`), of
which there are no parts.

`--functions` also prints the Python functions in which a token of each contender spends its time, by cProfile (which
slows Python down, so that its seconds aren't those of the table).
"""

import cProfile
import itertools
import pstats
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from common import interleaved, parser, report, show
from latency import CONTEXT, decisions, dense_model, routed_model
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from qtale_lightning import cpu
from qtale_lightning.models import RoutedCache, Routing, decoding
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.mappings import decoder_layers, linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import round_to_nearest

STEPS = 16
Run = Callable[[], Any]
Decisions = Sequence[Mapping[int, Tensor]]
Name = tuple[str, float, str]  # form, ratio, way


class Replayed(Routing):
    """Decisions of one step after the other: `generate` hands the same object to all of its calls."""

    def __init__(self, steps: Decisions) -> None:
        super().__init__()
        self.steps: Iterator[Mapping[int, Tensor]] = iter([{}, *steps])  # the prompt's come first

    def start(self) -> None:
        """Once a call."""
        super().start()
        self.forced = next(self.steps)


def generated(model: Any, prompt: Tensor, steps: Decisions | None, new: int) -> Run:
    """Greedy text of ``new`` tokens; the first of them is the prompt's."""
    settings = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0)
    mask = torch.ones_like(prompt)

    def run() -> None:
        routing = {} if steps is None else {"routing": Replayed(steps)}
        model.generate(prompt, attention_mask=mask, generation_config=settings, **routing)

    return run


def called(model: Any, prompt: Tensor, steps: Decisions | None) -> Run:
    """The model alone, token by token, after a prompt that a round computes anew only where its cache has grown far."""
    state: dict[str, Any] = {"left": 0}
    token = prompt[:, :1]

    def run() -> None:
        if state["left"] == 0:
            state["cache"] = DynamicCache() if steps is None else RoutedCache()
            routing = {} if steps is None else {"routing": Routing(threshold=0.0)}
            model(prompt, past_key_values=state["cache"], use_cache=True, logits_to_keep=1, **routing)
            state["left"] = 8
        state["left"] -= 1
        for step in range(STEPS):
            extra = {} if steps is None else {"routing": Routing(forced=steps[step])}
            model(token, past_key_values=state["cache"], use_cache=True, **extra).logits[:, -1].argmax(-1)

    return run


def parts(model: Any, batch: int, names: Sequence[str], steps: Decisions) -> dict[str, Run]:
    """The linears, operations, routers and head of a round's tokens, each alone."""
    layers, config, dtype = model.model.layers, model.config, model.dtype
    linears = [[layer.get_submodule(name) for name in names] for layer in layers]
    executing = [[(i, int(gate.sum())) for i, gate in step.items() if gate.any()] for step in steps]
    sizes = {linear.in_features for linear in linears[0]}
    states = {(n, size): torch.randn(1, n, size).to(dtype) for n in range(1, batch + 1) for size in sizes}
    hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    width, inner = linears[0][0].out_features // heads, config.intermediate_size
    x = states[batch, hidden].transpose(0, 1).contiguous()
    heads_of = {n: torch.randn(1, n, heads, width).to(dtype) for n in range(1, batch + 1)}
    keys_of = {n: torch.randn(1, n, groups, width).to(dtype) for n in range(1, batch + 1)}
    gates_of = {n: torch.randn(1, n, inner).to(dtype) for n in range(1, batch + 1)}
    cos = {n: torch.randn(1, n, width).to(dtype) for n in range(1, batch + 1)}
    keys, values = (
        [torch.randn(batch, groups, 2 * CONTEXT, width).to(dtype) for _ in layers] for _ in ("keys", "values")
    )

    def multiply() -> None:
        for step in executing:
            for i, n in step:
                for linear in linears[i]:
                    linear(states[n, linear.in_features])

    def route() -> None:
        for _ in steps:
            for layer in layers:
                layer.router(x)

    def operate() -> None:
        for step in executing:
            for i, n in step:
                norm = layers[i].input_layernorm.weight
                query = cpu.rotate(heads_of[n], cos[n], cos[n])
                key = cpu.rotate(keys_of[n], cos[n], cos[n])
                rows, lengths = [*range(n)], [CONTEXT + STEPS] * n
                cpu.attend_next(query, key, keys_of[n], keys[i], values[i], rows, lengths, 0.1)
                cpu.swiglu(gates_of[n], gates_of[n])
                for _ in "12":
                    cpu.rms_norm(states[n, hidden], norm, 1e-5)

    def predict() -> None:
        for _ in steps:
            model.lm_head(x).argmax(-1)

    return {"linears": multiply, "routers": route, "operations": operate, "head": predict}


def whole(
    model: Any, prompt: Tensor, steps: Decisions | None, name: Name
) -> dict[tuple[str, float, str, str], Run]:
    """A contender's rounds."""
    return {
        (*name, "generate"): generated(model, prompt, steps, STEPS + 1),
        (*name, "prompt"): generated(model, prompt, steps, 1),
        (*name, "model"): called(model, prompt, steps),
    }


def by_layers(run: Run) -> Run:
    """The same round, by the layers' modules."""

    def wrapped() -> None:
        one_call = decoding.next_token
        decoding.next_token = lambda *args: None
        try:
            run()
        finally:
            decoding.next_token = one_call

    return wrapped


def functions(name: str, run: Run, count: int) -> None:
    """Print those in which a contender spends its time."""
    run()
    with cProfile.Profile() as profile:
        run()
    print(f"\n{name}: {STEPS} tokens")
    pstats.Stats(profile).sort_stats("tottime").print_stats(count)


@torch.no_grad()
def measure(args: Any) -> list[dict[str, Any]]:
    """A row a contender."""
    dense = dense_model(args.model, None)
    count = dense.config.num_hidden_layers
    names = list(decoder_layers(dense)[0].linears)
    ours = {"bf16": routed_model(dense, args.model), "int4": routed_model(dense, args.model)}
    group = next(size for size in (128, 64, 32, 16) if dense.config.hidden_size % size == 0)
    quantize_model(ours["int4"], round_to_nearest(uniform(linear_shapes(ours["int4"]), 4, {}), group))
    rows = []
    for batch in args.batch:
        prompt = torch.randint(10, dense.config.vocab_size, (batch, CONTEXT))
        contenders = whole(dense, prompt, None, ("Hugging Face bf16", 1.0, ""))
        for form, ratio in itertools.product(args.forms, args.ratios):
            steps = [decisions(ratio, count, batch, 1, seed) for seed in range(STEPS)]
            of_parts = parts(ours[form], batch, names, steps)
            contenders |= whole(ours[form], prompt, steps, (form, ratio, "one call"))
            layers = whole(ours[form], prompt, steps, (form, ratio, "layers"))
            contenders |= {key: by_layers(run) for key, run in layers.items()}
            contenders |= {(form, ratio, "layers", part): run for part, run in of_parts.items()}
        seconds = interleaved(
            contenders, args.repeats, 1, time.process_time if args.cpu_seconds else time.perf_counter
        )
        for name in dict.fromkeys(key[:3] for key in seconds):
            form, ratio, way = name
            of = {key[3]: values for key, values in seconds.items() if key[:3] == name}
            of["generate"] = [a - b for a, b in zip(of["generate"], of.pop("prompt"), strict=True)]
            ms = {part: 1e3 * statistics.median(values) / STEPS for part, values in of.items()}
            row: dict[str, Any] = {"model": form, "ratio": ratio, "way": way, "batch": batch}
            row |= {"tokens/s": 1e3 * batch / ms["generate"]}
            known = [ms[part] for part in ("linears", "routers", "operations", "head") if part in ms]
            for part in ("generate", "model", "linears", "routers", "operations", "head"):
                row[f"{part} ms"] = ms.get(part, "")
            rows.append(row | {"python ms": ms["model"] - sum(known) if known else ""})
            show(rows[-1])
            if args.functions:
                run = contenders[form, ratio, way, "model"]
                functions(f"{form}, ratio {ratio:g}, {way}, batch {batch}", run, args.functions)
    return rows


def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--ratios", type=float, nargs="*", default=[1.0, 0.5])
    options.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    options.add_argument("--forms", nargs="*", default=["bf16", "int4"])
    options.add_argument(
        "--cpu-seconds",
        action="store_true",
        help="of the process: for one thread on a machine that others use",
    )
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument(
        "--functions", type=int, default=0, help="Python functions to print of each contender"
    )
    args = options.parse_args()
    if args.quick:
        args.model, args.repeats, args.batch = "tiny", 1, [1, 2]
    torch.manual_seed(0)
    report("decode", measure(args), [], args.json)


if __name__ == "__main__":
    main()
