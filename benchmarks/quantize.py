"""Engines side by side: seconds, extra memory and error of `native`, `autoawq` and `rtn` on real rows.

    python benchmarks/quantize.py --data FOLDER [--model smollm2-135m] [--bits 8 4 3 2] [--autoawq-bits 4] [--json FILE]

Each engine gets the same model and the same calibration tokens (training prompts and answers), and is judged on
validation questions: mean squared error and KL divergence of the logits against the model before, log-likelihood of
the gold answers and accuracy (whole protocol of a run). The weights are stored packed and run by the chosen kernels.

AutoAWQ takes minutes a model, so it runs at `--autoawq-bits` only. A search's extra memory is the growth of the
process's resident set while it runs; the limit beside it is one layer: its weights and its second moments in float32.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import claim, parser, report
from torch import Tensor

from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.evaluation.accuracy import accuracy_by_task, mean_error, mean_over_tasks
from qtale_lightning.evaluation.scoring import score
from qtale_lightning.models.modeling import RoutedLlamaConfig, RoutedLlamaForCausalLM, route
from qtale_lightning.models.sources import load_base, load_tokenizer
from qtale_lightning.quantization.calibration import padded_batches
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.mappings import decoder_layers, linear_shapes
from qtale_lightning.quantization.options import ENGINES, Engine
from qtale_lightning.quantization.precision import uniform

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


def layer_bytes(model: RoutedLlamaForCausalLM) -> int:
    """One layer in float32: its linears' weights, and the second moments of its four inputs."""
    layer = decoder_layers(model)[0]
    weights = sum(linear.weight.numel() for linear in layer.linears.values())
    inputs = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    return 4 * (weights + sum(layer.linears[name].in_features ** 2 for name in inputs))


def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("QTALE_DATA"),
        help="folder of <task>/train.jsonl and validation.jsonl (environment: QTALE_DATA); needed",
    )
    options.add_argument("--tasks", default="csqa")
    options.add_argument("--bits", type=int, nargs="*", default=[8, 4, 3, 2])
    options.add_argument("--autoawq-bits", type=int, nargs="*", default=[4])
    options.add_argument("--group-size", type=int, default=64)
    options.add_argument("--sequences", type=int, default=128, help="calibration sequences")
    options.add_argument("--questions", type=int, default=100, help="validation questions of each task")
    options.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = options.parse_args()
    if args.quick:
        args.model, args.tasks, args.group_size, args.sequences, args.questions = "tiny", "facts", 32, 32, 20
    elif args.data is None:
        print("skipped: give the folder of the real rows with --data or QTALE_DATA")
        return

    def load() -> RoutedLlamaForCausalLM:
        base = load_base(args.model, dtype=getattr(torch, args.dtype))
        without_routers = {"model_type": "routed_llama", "start_layer": base.config.num_hidden_layers}
        return route(base, RoutedLlamaConfig(**base.config.to_dict() | without_routers)).eval()

    tokenizer = load_tokenizer(args.model)
    data = CommonsenseDataModule(
        tasks=args.tasks, root=args.data and str(args.data), mix="uniform", limit_validation=args.questions
    )
    data.tokenizer = tokenizer
    data.setup("fit")
    batches = padded_batches(data.calibration_sequences(args.sequences))
    tokens = int(sum(batch["attention_mask"].sum() for batch in batches))
    questions = data.questions("validation")
    chosen = questions[:: max(1, len(questions) // HELD_OUT)]
    held_out = padded_batches([q.contexts[q.label] + q.continuations[q.label] for q in chosen])

    @torch.inference_mode()
    def logits(model: RoutedLlamaForCausalLM) -> Tensor:
        return torch.cat(
            [model(**batch).logits[batch["attention_mask"].bool()].float() for batch in held_out]
        )

    model = load()
    exact, shapes, limit = logits(model), linear_shapes(model), layer_bytes(model)
    metrics = data.protocol()["metrics"]

    def row(
        model: RoutedLlamaForCausalLM, bits: int, engine: str, seconds: float, grown: int
    ) -> dict[str, Any]:
        found = logits(model)
        kl = torch.nn.functional.kl_div(
            found.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        likelihoods = score(model, questions).loglikelihoods
        accuracy = accuracy_by_task(questions, likelihoods, metrics)
        return {
            "bits": bits, "engine": engine, "search s": seconds, "extra MB": grown / 1e6, "a layer MB": limit / 1e6,
            "logits MSE": (found - exact).square().mean().item(), "KL": kl.item(),
            "answer nll": mean_over_tasks(accuracy, "nll"), "± nll": mean_error(accuracy, "nll_stderr"),
            "accuracy %": 100 * mean_over_tasks(accuracy, "value"), "± %": 100 * mean_error(accuracy, "stderr"),
        }  # fmt: skip

    rows = [row(model, 16, "none", 0.0, 0)]
    engines: dict[Engine, list[int]] = {"native": args.bits, "rtn": args.bits, "autoawq": args.autoawq_bits}
    for engine, widths in engines.items():
        for bits in widths:
            call = partial(ENGINES[engine], model, batches, [uniform(shapes, bits, {})], args.group_size)
            (recipe,), seconds, grown = measured(call)
            quantized = load()
            quantize_model(quantized, recipe)
            rows.append(row(quantized, bits, engine, seconds, grown))
            print(
                {key: round(v, 4) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True
            )
    rows.sort(key=lambda one: (-one["bits"], one["engine"]))
    print(
        f"calibration: {tokens} tokens of {args.sequences} sequences; {len(questions)} validation questions"
    )

    claims = []
    found = {(one["engine"], one["bits"]): one for one in rows}
    for bits in args.autoawq_bits:
        if ("native", bits) in found:
            ours, theirs = found["native", bits], found["autoawq", bits]
            ratio = {key: ours[key] / theirs[key] for key in ("search s", "KL", "logits MSE")}
            claims += [
                claim(f"seconds, autoawq over native, {bits} bits", 1 / ratio["search s"], 20, "higher"),
                claim(f"KL, native over autoawq, {bits} bits", ratio["KL"], 1, "lower"),
                claim(f"logits MSE, native over autoawq, {bits} bits", ratio["logits MSE"], 1, "lower"),
                claim("native's extra memory in layers", ours["extra MB"] / ours["a layer MB"], 1, "lower"),
            ]
    report("quantize", rows, claims, args.json)


if __name__ == "__main__":
    main()
