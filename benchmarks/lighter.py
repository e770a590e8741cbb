"""What tokens in 8 bits and a head in 8 or 4 bits cost and save: KL divergence, and seconds of decode and prefill.

    python benchmarks/lighter.py --data FOLDER [--model smollm2-135m] [--bits 4] [--group-size 64] [--json FILE]

The model's linears are rounded to nearest. "KL" is that of the logits against the same model with tokens and head as
they are, "to 16 bits" against the model before any rounding; both a token, on validation questions with their gold
answers. Seconds are medians of interleaved rounds with every layer executed: a token of decode at batch 1, and
a prompt of 512 tokens. QTALE_CPU_ISA chooses our instructions, ATEN_CPU_CAPABILITY PyTorch's too.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import interleaved, report, rows_parser
from latency import STEPS, decode, prefill
from torch import Tensor

from qtale_lightning import cpu
from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.models import RoutedForCausalLM, Routing, route, routed_config
from qtale_lightning.models.sources import load_base, load_tokenizer
from qtale_lightning.precision import native_bfloat16
from qtale_lightning.quantization.calibration import padded_batches
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.lighter import lighten
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import round_to_nearest

HELD_OUT = 64  # validation prompts, with their gold answers, whose logits are compared
KINDS = ((16, 16), (8, 16), (16, 8), (16, 4), (8, 8), (8, 4))  # bits of tokens and of the head


def divergence(of: Tensor, to: Tensor) -> float:
    """KL(to ‖ of) a token, in nats, from logits ``(N, V)``."""
    return torch.nn.functional.kl_div(
        of.log_softmax(-1), to.log_softmax(-1), log_target=True, reduction="batchmean"
    ).item()


@torch.inference_mode()
def main() -> None:
    """Measure and report."""
    options = rows_parser(__doc__)
    options.add_argument("--bits", type=int, default=4)
    options.add_argument("--group-size", type=int, default=64)
    options.add_argument("--repeats", type=int, default=9)
    args = options.parse_args()
    length = 512
    if args.quick:
        args.model, args.tasks, args.group_size, args.repeats, length = "tiny", "facts", 32, 2, 32
    elif args.data is None:
        print("skipped: give the folder of the real rows with --data or QTALE_DATA")
        return
    dtype = torch.bfloat16 if native_bfloat16() else torch.float32
    data = CommonsenseDataModule(
        tasks=args.tasks, root=args.data and str(args.data), mix="uniform", limit_validation=20
    )
    data.tokenizer = load_tokenizer(args.model)
    data.setup("fit")
    questions = data.questions("validation")
    chosen = questions[:: max(1, len(questions) // HELD_OUT)]
    held_out = padded_batches([q.contexts[q.label] + q.continuations[q.label] for q in chosen])

    def load() -> RoutedForCausalLM:
        base = load_base(args.model, dtype=dtype)
        return route(base, routed_config(base.config, start_layer=0)).eval()

    def logits(model: RoutedForCausalLM) -> Tensor:
        found = []
        for batch in held_out:
            output = model(**batch, routing=Routing(threshold=0.0)).logits
            found.append(output[batch["attention_mask"].bool()].float())
        return torch.cat(found)

    model = load()
    exact = logits(model)
    shapes = linear_shapes(model)
    runs: dict[tuple[str, tuple[int, int]], Callable[[], Any]] = {}
    rows: list[dict[str, Any]] = []
    plain: Tensor | None = None
    for tokens, head in KINDS:
        model = load()
        quantize_model(model, round_to_nearest(uniform(shapes, args.bits, {}), args.group_size))
        lighten(model, tokens, head)  # type: ignore[arg-type]
        found = logits(model)
        plain = found if plain is None else plain
        rows.append(
            {"tokens' bits": tokens, "head's bits": head, "KL ×1000": 1e3 * divergence(found, plain)}
            | {"to 16 bits ×1000": 1e3 * divergence(found, exact)}
        )
        everything = [
            {layer: torch.ones(1, 1, dtype=torch.bool) for layer in range(model.config.num_hidden_layers)}
        ]
        runs["decode", (tokens, head)] = decode(model, 1, everything * STEPS)
        ids = torch.randint(10, model.config.vocab_size, (1, length))
        runs["prefill", (tokens, head)] = prefill(model, ids, lambda: Routing(threshold=0.0))
    seconds = interleaved(runs, args.repeats)
    for row, kind in zip(rows, KINDS, strict=True):
        row["decode ms"] = 1e3 * statistics.median(seconds["decode", kind]) / STEPS
        row["prefill ms"] = 1e3 * statistics.median(seconds["prefill", kind])
    print(
        f"{args.model}, {args.bits} bits in groups of {args.group_size}, {dtype}, {cpu.instruction_set()}, "
        f"{len(exact)} tokens compared, prompts of {length}"
    )
    report("lighter", rows, [], args.json)


if __name__ == "__main__":
    main()
