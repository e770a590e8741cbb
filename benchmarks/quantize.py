"""Engines side by side: seconds, extra memory and error of the suite's engines and AutoRound's own on real rows.

    python benchmarks/quantize.py --data FOLDER [--model smollm2-135m] [--bits 8 4 3 2] [--autoawq-bits 4] [--json FILE]
    python benchmarks/quantize.py --data FOLDER --bits 4 3 --autoawq-bits --sequential  # layers see quantized ones
    python benchmarks/quantize.py --data FOLDER --bits 4 3 2 --autoawq-bits --signround-bits 4 3 2 \\
        --auto-round PYTHON --peers FOLDER

Each engine gets the same model and the same calibration tokens (training prompts and answers), and is judged on
validation questions: mean squared error and KL divergence of the logits against the model before, log-likelihood of
the gold answers and accuracy (whole protocol of a run). The weights are stored packed and run by the chosen kernels.
Seconds are of the search and, for `native`, of the final norm's fit; `native, norm kept` is the same search without it.
`gptq, act order` takes columns in order of falling second moments. With `--sequential`, every calibrating engine that
runs at all of `--bits` is measured a second time with layers calibrated on what the quantized ones before them give;
`signround`, whose published form that is, on what the model's own give.

With `--nested`, the engine of that name searches its folder of 4 bits once, and each of the widths in it is judged.

AutoAWQ takes minutes a model, so it runs at `--autoawq-bits` only, as `signround` does at `--signround-bits`. At those
widths they and `native` search on each of `--sets` disjoint sets of calibration sequences: what a search finds, and so
its errors, hangs on the sequences. A fraction among `--bits` is an average that the engine native spends where its
errors are largest.

With `--auto-round PYTHON`, an interpreter that has the package auto-round, its own quantizer runs at `--signround-bits`
with its own defaults on the same tokens, end to end in rows of 64, since it takes rows of one length: see autoround/.
It takes half an hour a width and set, so what it leaves in `--peers` is kept, and taken from there.

The logits' mean squared error is given as it is, and without each token's mean over the vocabulary ("centred"): softmax
ignores that mean, and most of the plain error is in it.

A search's extra memory is the growth of the process's resident set while it runs; the limit beside it is one layer:
its weights and its second moments in float32. A small model's is mostly activations and the allocator's reserve, so it
is also measured on one layer of `--memory-model`'s shape, with random weights and tokens, in a process of its own:
what this one freed before and still holds would hide growth, or fragment it.
"""

import ctypes
import json
import math
import multiprocessing
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import claim, report, rows_parser, show
from safetensors.torch import load_file
from torch import Tensor

from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.evaluation.accuracy import accuracy_by_task, mean_error, mean_over_tasks
from qtale_lightning.evaluation.scoring import score
from qtale_lightning.models import RoutedForCausalLM, route, routed_config
from qtale_lightning.models.families import classes_of
from qtale_lightning.models.sources import base_config, load_base, load_tokenizer
from qtale_lightning.quantization.calibration import Batch, padded_batches
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.engines import find
from qtale_lightning.quantization.final_norm import refit_final_norm
from qtale_lightning.quantization.linear import QuantizedLinear
from qtale_lightning.quantization.mappings import decoder_layers, linear_shapes
from qtale_lightning.quantization.options import QuantizationOptions
from qtale_lightning.quantization.precision import allocate, neighbours, uniform
from qtale_lightning.quantization.recipe import Recipe

COMPARED = ("native", "autoawq", "signround")  # on every set of calibration sequences
PEER_ROW = 64  # tokens of a row that AutoRound gets
AGAINST_AUTOAWQ = (
    ("search s", 20, "higher"),
    ("KL", 1, "lower"),
    ("centred MSE", 1, "lower"),
    ("logits MSE", 1, "lower"),
)
LEARNED = {4: 0.9, 3: 0.7, 2: 0.5}  # KL of learned rounding over native's, by bits: the goals
HELD_OUT = 64  # validation prompts, with their gold answers, whose logits are compared


def resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def measured(run: Callable[[], Any]) -> tuple[Any, float, int]:
    """A call's result, its seconds, and by how much the process grew at most while it ran."""
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still held would hide growth
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        result = run()
    finally:
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
    return result, seconds, max(0, peak - before)


def search(
    model: RoutedForCausalLM, batches: Sequence[Batch], options: QuantizationOptions, bits: float
) -> tuple[Recipe, Tensor | None]:
    """What an engine makes of a width, or of an average: a recipe, and where it fits one, the final norm's weight."""
    shapes = linear_shapes(model)
    widths = [int(bits)] if bits == int(bits) else [*neighbours(bits)]
    wanted = [uniform(shapes, width, {}) for width in widths]
    recipes = options.declared(model, batches, wanted, options.group_size, **options.search_options)
    found = dict(zip(widths, recipes, strict=True))
    recipe = recipes[0] if len(recipes) == 1 else allocate(shapes, found, bits)
    return recipe, refit_final_norm(model, recipe, batches) if options.refits else None


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
    _, _, grown = measured(partial(search, model, batches, QuantizationOptions(group_size=group_size), 4))
    return grown / 1e6, layer_bytes(model) / 1e6


def auto_round(
    args: Any, folder: Path, sequences: Sequence[Sequence[int]], bits: int
) -> tuple[dict[str, Tensor], float, int] | None:
    """AutoRound's own weights, seconds and extra bytes at a width; None where it hasn't run and can't."""
    if not (folder / f"{bits}bit.json").is_file():
        if not args.auto_round:
            return None
        tokens = [token for sequence in sequences for token in sequence]
        cut = range(0, len(tokens) - PEER_ROW + 1, PEER_ROW)
        load_base(args.model, dtype=getattr(torch, args.dtype)).save_pretrained(folder)
        load_tokenizer(args.model).save_pretrained(folder)
        (folder / "rows.json").write_text(
            json.dumps([tokens[i : i + PEER_ROW] for i in cut]), encoding="utf-8"
        )
        numbers = (bits, args.group_size, find("signround").options["batch"], args.steps)
        script = Path(__file__).parent / "autoround" / "learn.py"
        subprocess.run([args.auto_round, script, folder, *map(str, numbers)], check=True)
    took = json.loads((folder / f"{bits}bit.json").read_text(encoding="utf-8"))
    return load_file(folder / f"{bits}bit.safetensors"), took["seconds"], took["grown"]


def main() -> None:
    """Measure and report."""
    parser = rows_parser(__doc__)
    parser.add_argument("--bits", type=float, nargs="*", default=[8, 4, 3.5, 3, 2])
    parser.add_argument("--autoawq-bits", type=int, nargs="*", default=[4])
    parser.add_argument("--signround-bits", type=int, nargs="*", default=[])
    parser.add_argument("--nested", action="store_true", help="the engine nested, too, at all of its widths")
    parser.add_argument("--steps", type=int, default=200, help="of signround, nested and auto-round")
    parser.add_argument("--auto-round", help="a Python that has auto-round")
    parser.add_argument("--peers", type=Path, help="folder that keeps what auto-round finds")
    parser.add_argument("--peer-sets", type=int, default=1, help="calibration sets that auto-round runs on")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences of a set")
    parser.add_argument("--sets", type=int, default=3, help="calibration sets that engines are compared on")
    parser.add_argument("--questions", type=int, default=100, help="validation questions of each task")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--memory-model", default="llama2-7b", help="preset whose layer's memory is measured")
    parser.add_argument("--sequential", action="store_true", help="calibrate on quantized layers, too")
    args = parser.parse_args()
    if args.quick:
        args.model, args.tasks, args.group_size, args.sequences, args.questions = "tiny", "facts", 32, 32, 20
        args.memory_model, args.sets = "tiny", 2
        args.signround_bits, args.steps, args.nested = [4], 5, True
    elif args.data is None:
        print("skipped: give the folder of the real rows with --data or QTALE_DATA")
        return

    def load() -> RoutedForCausalLM:
        base = load_base(args.model, dtype=getattr(torch, args.dtype))
        without_routers = {"start_layer": base.config.num_hidden_layers}
        return route(base, routed_config(base.config, **without_routers)).eval()

    tokenizer = load_tokenizer(args.model)
    data = CommonsenseDataModule(
        tasks=args.tasks, root=args.data and str(args.data), mix="uniform", limit_validation=args.questions
    )
    data.tokenizer = tokenizer
    data.setup("fit")
    sequences = data.calibration_sequences(args.sequences * args.sets)
    sets = [
        padded_batches(sequences[start : start + args.sequences])
        for start in range(0, len(sequences), args.sequences)
    ]
    questions = data.questions("validation")
    chosen = questions[:: max(1, len(questions) // HELD_OUT)]
    held_out = padded_batches([q.contexts[q.label] + q.continuations[q.label] for q in chosen])

    @torch.inference_mode()
    def logits(model: RoutedForCausalLM) -> Tensor:
        return torch.cat(
            [model(**batch).logits[batch["attention_mask"].bool()].float() for batch in held_out]
        )

    model = load()
    exact, limit = logits(model), layer_bytes(model)
    metrics = data.protocol()["metrics"]

    def row(
        model: RoutedForCausalLM, bits: float, engine: str, number: int, seconds: float, grown: int
    ) -> dict[str, Any]:
        found = logits(model)
        delta = found - exact
        kl = torch.nn.functional.kl_div(
            found.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        likelihoods = score(model, questions).loglikelihoods
        accuracy = accuracy_by_task(questions, likelihoods, metrics)
        return {
            "bits": bits, "engine": engine, "set": number, "search s": seconds,
            "extra MB": grown / 1e6, "a layer MB": limit / 1e6,
            "logits MSE": delta.square().mean().item(),
            "centred MSE": delta.sub_(delta.mean(-1, keepdim=True)).square_().mean().item(), "KL": kl.item(),
            "answer nll": mean_over_tasks(accuracy, "nll"), "± nll": mean_error(accuracy, "nll_stderr"),
            "accuracy %": 100 * mean_over_tasks(accuracy, "value"), "± %": 100 * mean_error(accuracy, "stderr"),
        }  # fmt: skip

    rows = [row(model, 16, "none", 0, 0.0, 0)]
    whole = [int(bits) for bits in args.bits if bits == int(bits)]
    variants: dict[str, tuple[list[float], dict[str, Any]]] = {
        "native": (args.bits, {}),
        "rtn": ([*whole], {"engine": "rtn"}),
        "gptq": ([*whole], {"engine": "gptq"}),
        "gptq, act order": ([*whole], {"engine": "gptq", "options": {"act_order": True}}),
        "autoawq": ([*args.autoawq_bits], {"engine": "autoawq"}),
        "signround": (
            [*args.signround_bits],
            {"engine": "signround", "options": {"steps": args.steps}},
        ),
    }
    if args.sequential:
        variants["signround, model's inputs"] = (
            [*args.signround_bits],
            {"engine": "signround", "options": {"steps": args.steps}, "sequential": False},
        )
        for name in ("native", "gptq", "gptq, act order"):
            variants[f"{name}, sequential"] = (variants[name][0], variants[name][1] | {"sequential": True})
    for name, (widths, given) in variants.items():
        options = QuantizationOptions(group_size=args.group_size, **given)
        for bits in widths:
            compared = bits in (*args.autoawq_bits, *args.signround_bits) and name in COMPARED
            for number, batches in enumerate(sets if compared else sets[:1]):
                (recipe, final_norm), seconds, grown = measured(
                    partial(search, model, batches, options, bits)
                )
                made: dict[str, Tensor | None] = {name: final_norm}
                if final_norm is not None:
                    made[f"{name}, norm kept"] = None
                for said, norm in made.items():
                    quantized = load()
                    quantize_model(quantized, recipe, norm)
                    rows.append(row(quantized, bits, said, number, seconds, grown))
                    show(rows[-1])
    if args.nested:
        options = QuantizationOptions(
            group_size=args.group_size, engine="nested", options={"steps": args.steps}
        )
        (recipe, _), seconds, grown = measured(
            partial(search, model, sets[0], options, options.declared.holds)
        )
        quantized = load()
        quantize_model(quantized, recipe)
        for bits in recipe.held:
            for linear in quantized.modules():
                if isinstance(linear, QuantizedLinear):
                    linear.read_at(bits)
            rows.append(row(quantized, bits, "nested", 0, seconds, grown))
            show(rows[-1])
    for number, part in enumerate(range(0, args.peer_sets * args.sequences, args.sequences)):
        for bits in args.signround_bits if args.auto_round or args.peers else []:
            made_there = auto_round(
                args, args.peers / f"set{number}", sequences[part : part + args.sequences], bits
            )
            if made_there is None:
                continue
            weights, seconds, grown = made_there
            rounded = load()
            rounded.load_state_dict(weights, strict=False)
            rows.append(row(rounded, bits, "auto-round", number, seconds, grown))
            show(rows[-1])
    rows.sort(key=lambda one: (-one["bits"], one["engine"], one["set"]))
    tokens = ", ".join(str(int(sum(batch["attention_mask"].sum() for batch in one))) for one in sets)
    print(
        f"calibration sets of {args.sequences} sequences: {tokens} tokens; {len(questions)} validation questions"
    )

    claims = []
    for bits, ours, theirs, key, goal, better in (
        *((b, "native", "autoawq", *goal) for b in args.autoawq_bits for goal in AGAINST_AUTOAWQ),
        *((b, "signround", "native", "KL", LEARNED.get(b, 1), "lower") for b in args.signround_bits),
        *((b, "signround", "auto-round", "KL", 1, "lower") for b in args.signround_bits),
        *((b, "signround", "auto-round", "search s", 3, "higher") for b in args.signround_bits),
    ):
        mine, others = (
            {one["set"]: one[key] for one in rows if (one["engine"], one["bits"]) == (engine, bits)}
            for engine in (ours, theirs)
        )
        ratios = [
            others[n] / mine[n] if better == "higher" else mine[n] / others[n] for n in mine.keys() & others
        ]
        if not ratios:
            continue
        spread = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else math.nan
        first, second = (theirs, ours) if better == "higher" else (ours, theirs)
        name = f"{key}, {first} over {second}, {bits} bits, mean of {len(ratios)} set(s) (± {spread:.2f})"
        claims.append(claim(name, statistics.mean(ratios), goal, better))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        extra, one_layer = fresh.submit(memory_of, args.memory_model, args.group_size).result()
    what = (
        f"native's extra memory, MB, on a layer of {args.memory_model} (limit: {one_layer:.0f} MB, the layer)"
    )
    claims.append(claim(what, extra, one_layer, "lower"))
    report("quantize", rows, claims, args.json)


if __name__ == "__main__":
    main()
