"""Engines side by side: seconds, extra memory and error of the suite's engines and AutoRound's own on real rows.

    python benchmarks/quantize.py --data FOLDER [--model smollm2-135m] [--bits 8 4 3 2] [--autoawq-bits 4] [--json FILE]
    python benchmarks/quantize.py --data FOLDER --bits 4 3 --autoawq-bits --sequential  # layers see quantized ones
    python benchmarks/quantize.py --data FOLDER --bits 4 3 2 --autoawq-bits --signround-bits 4 3 2 --nested \\
        --auto-round PYTHON --peers FOLDER --json FILE [--minutes 100] [--only auto-round:3:0]

Each engine gets the same model and the same calibration tokens (training prompts and answers), and is judged on
validation questions: mean squared error and KL divergence of the logits against the model before, log-likelihood of
the gold answers and accuracy (whole protocol of a run). The weights are stored packed and run by the chosen kernels.
Seconds are of the search and, for `native`, of the final norm's fit; `native, norm kept` is the same search without it.
`gptq, act order` takes columns in order of falling second moments. With `--sequential`, every calibrating engine that
runs at all of `--bits` is measured a second time with layers calibrated on what the quantized ones before them give;
`signround`, whose published form that is, on what the model's own give.

With `--fewer-steps 50`, `signround` searches by so many steps, too: what it finds in less time.

With `--nested`, the engine of that name searches its folder of 4 bits, and each of the widths in it is judged.

AutoAWQ takes minutes a model, so it runs at `--autoawq-bits` only, as `signround` does at `--signround-bits`. At those
widths they and `native`, and `nested`, search on each of `--sets` disjoint sets of calibration sequences: what a search
finds, and so its errors, hangs on the sequences. A fraction among `--bits` is an average that the engine native spends
where its errors are largest.

With `--auto-round PYTHON`, an interpreter that has the package auto-round, its own quantizer runs at
`--signround-bits`: the same tokens, end to end in rows of 64, since it takes rows of one length; the same linears (all
but the head), group size, bits and zero points (its default is symmetric, the suite's isn't), `--steps` and threads;
all else is its default, with what PyTorch compiles for it in its seconds. A step of both takes 8 sequences, which are
shorter here than its rows. It fits no norm: `signround, norm kept` is compared with it, too. What it finds is kept in
`--peers`.

Everything of hours is in parts: a search's rows are in `--json` as soon as it has ended, and the same command goes on
with those that are missing; set by set, or as `--only ENGINE[:BITS[:SET]]` says, `--minutes` at most. A file of other
settings is refused. Engines' times are compared by processor time, which a machine that others use still tells.

The logits' mean squared error is given as it is, and without each token's mean over the vocabulary ("centred"): softmax
ignores that mean, and most of the plain error is in it.

A search's extra memory is the growth of the process's resident set while it runs; the limit beside it is one layer:
its weights and its second moments in float32. A small model's is mostly activations and the allocator's reserve, so it
is also measured on one layer of `--memory-model`'s shape, with random weights and tokens, in a process of its own:
what this one freed before and still holds would hide growth, or fragment it.
"""

import multiprocessing
import sys
from argparse import ArgumentParser
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from common import claim, report, rows_parser
from quantizers.claims import claims, show_means
from quantizers.cost import memory_of
from quantizers.entries import entries
from quantizers.judge import Judge
from quantizers.peer import check
from quantizers.record import Record
from quantizers.running import measure

MEMORY = "native's extra memory"


def arguments() -> ArgumentParser:
    """The command line."""
    parser = rows_parser(__doc__)
    parser.add_argument("--bits", type=float, nargs="*", default=[8, 4, 3.5, 3, 2])
    parser.add_argument("--autoawq-bits", type=int, nargs="*", default=[4])
    parser.add_argument("--signround-bits", type=int, nargs="*", default=[])
    parser.add_argument("--nested", action="store_true", help="the engine nested, too, at all of its widths")
    parser.add_argument("--steps", type=int, default=200, help="of signround, nested and auto-round")
    parser.add_argument("--fewer-steps", type=int, nargs="*", default=[], help="signround by as many, too")
    parser.add_argument("--auto-round", metavar="PYTHON", help="a Python that has auto-round")
    parser.add_argument("--peers", type=Path, help="folder that keeps what auto-round finds")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences of a set")
    parser.add_argument("--sets", type=int, default=3, help="calibration sets that engines are compared on")
    parser.add_argument("--questions", type=int, default=100, help="validation questions of each task")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--memory-model", default="llama2-7b", help="preset whose layer's memory is measured, or none"
    )
    parser.add_argument("--sequential", action="store_true", help="calibrate on quantized layers, too")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="ENGINE[:BITS[:SET]]", help="searches, by patterns"
    )
    parser.add_argument("--minutes", type=float, help="begin nothing that would end later")
    return parser


def memory_claim(model: str, group_size: int) -> dict[str, Any]:
    """What a search needs on one layer of a preset, in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        extra, layer = fresh.submit(memory_of, model, group_size).result()
    return claim(
        f"{MEMORY}, MB, on a layer of {model} (limit: {layer:.0f} MB, the layer)", extra, layer, "lower"
    )


def main() -> None:
    """Measure and report."""
    args = arguments().parse_args()
    if args.quick:
        args.model, args.tasks, args.group_size, args.sequences, args.questions = "tiny", "facts", 32, 32, 20
        args.memory_model, args.sets = "tiny", 2
        args.signround_bits, args.steps, args.nested = [4], 5, True
    elif args.data is None and args.tasks != "facts":
        print("skipped: give the folder of the real rows with --data or QTALE_DATA")
        return
    if args.auto_round and args.peers is None:
        raise ValueError("--auto-round needs --peers, a folder that keeps what it finds")
    if args.auto_round:
        check(args.auto_round)
    judge = Judge(args)
    kept = ("model", "dtype", "tasks", "group_size", "sequences", "questions", "steps")
    record = Record("quantize", args.json, {name: vars(args)[name] for name in kept} | {"rows": judge.rows})
    left = measure(entries(args, judge), record, args.minutes)
    if not record.rows:
        raise ValueError(f"--only {' '.join(args.only)} names no search")
    print(
        f"calibration sets of {args.sequences} sequences: {', '.join(map(str, judge.tokens()))} tokens; "
        f"{len(judge.questions)} validation questions"
    )
    made = claims(record.rows, args.autoawq_bits, args.signround_bits)
    there = [one for one in record.claims if one["claim"].startswith(MEMORY)]
    if not there and not left and args.memory_model != "none":
        there = [memory_claim(args.memory_model, args.group_size)]
    report("quantize", record.rows, made + there, args.json)
    show_means(record.rows)
    if left:
        print(f"{left} searches are left: the same command goes on")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
