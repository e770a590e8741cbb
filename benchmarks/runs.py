"""Seconds of finished runs at their own decisions, and what they know: each against the first one given.

    python benchmarks/runs.py RUN RUN … [--bits 16 4 3] [--engine native] [--budget 0.8] [--questions 10] [--json FILE]

Unlike in latency.py, nothing is forced: trained routers decide about real validation questions, at the θ that the run
selected for `--budget` at each precision (without it, the model's own). All runs are asked the same questions, and are
computed by the same operations: a full model is a routed one without routers.

- `score`: log-likelihoods of every choice of `--questions` questions of each task, as evaluation computes them.
- `prompt`: the last position's logits of 8 questions' prompts, one after the other.
- `token`: greedy tokens behind each of these, `--new` in all; a sequence never ends.
- Seconds are medians of rounds in which the contenders alternate; `×` is the median over rounds of the first run's
  seconds over the run's. The range is that of the rounds.
- `limit`: what counted FLOPs allow for `score`; for `token` the bytes that a token reads of weights, of the layers that
  are executed and of the head, the first run's over the run's.
- `executed` counts layers: of all scored tokens, and of written ones. Accuracy and nll are the run's own, of all its
  validation questions.
"""

import math
import statistics
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from common import median_ratio, parser, report, show
from torch import Tensor, nn

from qtale_lightning.cli import QTALECLI
from qtale_lightning.data import EncodedPrompt
from qtale_lightning.evaluation import cost
from qtale_lightning.evaluation.scoring import score
from qtale_lightning.models import RoutedCache, RoutedForCausalLM, Routing
from qtale_lightning.models.routing import by_layer
from qtale_lightning.quantization.linear import QuantizedLinear
from qtale_lightning.results.schema import Evaluation
from qtale_lightning.results.series import own_rows
from qtale_lightning.results.store import load_or_new, same_theta
from qtale_lightning.run import RunDirectory
from qtale_lightning.stages import load_exported

PROMPTS = 8
Theta = float | list[float] | None


@dataclass(frozen=True)
class Contender:
    """A run's model at a precision, its θ, and what is known of it."""

    name: str
    model: RoutedForCausalLM
    theta: Theta
    known: Evaluation | None

    def said(self, what: Literal["average", "average_nll"]) -> float:
        """What its evaluation says; NaN where there is none, or tasks have no average."""
        found = None if self.known is None else self.known[what]
        return math.nan if found is None else found

    def executed(self, routing: Routing) -> float:
        """Layers that a token executed, by their weights."""
        config = self.model.config
        units = routing.executed(config.num_hidden_layers * len(config.unit_shares))
        return float(by_layer(units.double(), config.unit_shares).sum())

    def routing(self) -> Routing:
        """Decisions of one call."""
        return Routing(threshold=self.theta)


def contender(run: RunDirectory, bits: float, engine: str, budget: float | None) -> Contender:
    """Refuses a run that selected no θ for a budget (ValueError)."""
    engine = "none" if bits == 16 else engine
    results = load_or_new(run.root)
    model = load_exported(run, bits) if bits == 16 else load_exported(run, bits, engine)
    theta: Theta = None
    if model.config.has_theta:
        theta = model.config.threshold
        if budget is not None:
            found = [
                row["theta"]
                for row in results["selected"]
                if (row["bits"], row["engine"], row.get("budget")) == (bits, engine, budget)
            ]
            if not found:
                raise ValueError(
                    f"{run.root} selected no θ for a budget of {budget} at {bits:g} bits: `thresholds {run.root} "
                    f"--sweep.rule budget --sweep.budgets [{budget}]` does, or leave --budget out"
                )
            theta = found[0]
    known = (
        row
        for row in own_rows(results)
        if (row["bits"], row["engine"]) == (bits, engine) and same_theta(row["theta"], theta)
    )
    return Contender(run.root.name, model, theta, next(known, None))


def clock() -> float:
    """Seconds, behind what the device has been given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def write(
    one: Contender, prompts: Sequence[Tensor], new: int, layers: list[float] | None = None
) -> tuple[float, float]:
    """Seconds of some prompts, and of `new` tokens behind each; `layers` gets how many each of these executed."""
    prompting = writing = 0.0
    for prompt in prompts:
        cache, began = RoutedCache(), clock()
        logits = one.model(prompt, past_key_values=cache, logits_to_keep=1, routing=one.routing()).logits
        token, behind = logits[:, -1].argmax(-1, keepdim=True), clock()
        for _ in range(new):
            routing = one.routing()
            logits = one.model(token, past_key_values=cache, routing=routing).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            if layers is not None:
                layers.append(one.executed(routing))
        prompting, writing = prompting + behind - began, writing + clock() - behind
    return prompting, writing


def bytes_of(module: nn.Module) -> float:
    """Of a module's weights, in the form that they are multiplied in; NaN where that isn't known."""
    if isinstance(module, QuantizedLinear):
        parts = module.operands(torch.float32)
        return math.nan if parts is None else sum(part.nbytes for part in parts)
    own = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
    return own + sum(map(bytes_of, module.children()))


def token_bytes(one: Contender, executed: float) -> float:
    """Of weights that a token reads: so many layers, keys and values where they are kept, routers and the head."""
    layers = list(one.model.model.layers)
    routers = sum(bytes_of(layer.router) for layer in layers if layer.router is not None)
    body = (sum(map(bytes_of, layers)) - routers) / len(layers)
    kept = 0.0
    if one.model.config.keep_kv:
        attention = layers[0].self_attn
        kept = (len(layers) - executed) * (bytes_of(attention.k_proj) + bytes_of(attention.v_proj))
    return executed * body + kept + routers + bytes_of(one.model.lm_head)


@torch.inference_mode()
def measured(
    contenders: Sequence[Contender], questions: Sequence[EncodedPrompt], args: Namespace
) -> list[dict[str, Any]]:
    """A row for each contender, of one precision."""
    spread = [questions[at * len(questions) // PROMPTS] for at in range(min(PROMPTS, len(questions)))]
    prompts = [torch.tensor([question.contexts[0]], device=contenders[0].model.device) for question in spread]
    new = -(-args.new // len(prompts))
    context = statistics.mean(len(question.contexts[0]) for question in questions) / 2
    scored = [score(one.model, questions, one.theta) for one in contenders]
    executed: list[float] = []
    for one in contenders:  # which warms up, too
        layers: list[float] = []
        write(one, prompts, new, layers)
        executed.append(statistics.mean(layers))
    seconds: list[dict[str, list[float]]] = [defaultdict(list) for _ in contenders]
    for _ in range(args.repeats):
        for one, own in zip(contenders, seconds, strict=True):
            began = clock()
            score(one.model, questions, one.theta)
            found = clock() - began, *write(one, prompts, new)
            for what, value in zip(("score", "prompt", "token"), found, strict=True):
                own[what].append(value)

    def times(at: int, what: str) -> dict[str, float]:
        first, own = seconds[0][what], seconds[at][what]
        ratios = [a / b for a, b in zip(first, own, strict=True)]
        return {"×": median_ratio(first, own), "least": min(ratios), "most": max(ratios)}

    flops = [
        cost.token_flops(one.model.config, scores.units, context, head=False)
        for one, scores in zip(contenders, scored, strict=True)
    ]
    rows: list[dict[str, Any]] = []
    for at, (one, scores) in enumerate(zip(contenders, scored, strict=True)):
        ranges = {what: times(at, what) for what in seconds[at]}
        row = {
            "run": one.name,
            "bits": args.precision,
            "θ": "–" if one.theta is None else str(one.theta),
            "accuracy %": 100 * one.said("average"),
            "nll": one.said("average_nll"),
            "executed": statistics.mean(scores.execution),
            "score s": statistics.median(seconds[at]["score"]),
            "score ×": ranges["score"]["×"],
            "limit": flops[0] / flops[at],
            "prompt ms": 1e3 * statistics.median(seconds[at]["prompt"]) / len(prompts),
            "prompt ×": ranges["prompt"]["×"],
            "token executed": executed[at] / cost.base_layers(one.model.config),
            "tokens/s": len(prompts) * new / statistics.median(seconds[at]["token"]),
            "token ×": ranges["token"]["×"],
            "token limit": token_bytes(contenders[0], executed[0]) / token_bytes(one, executed[at]),
            "ranges": ranges,
        }
        show(row)
        rows.append(row)
    return rows


def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument(
        "runs", type=Path, nargs="+", help="directories of finished runs; the first is the measure"
    )
    options.add_argument("--bits", type=float, nargs="*", default=[16, 4, 3])
    options.add_argument("--engine", default="native", help="that quantized them")
    options.add_argument(
        "--budget", type=float, help="execution ratio that θ was selected for; none: the model's θ"
    )
    options.add_argument("--questions", type=int, default=10, help="validation questions of each task")
    options.add_argument("--new", type=int, default=256, help="tokens to write")
    options.add_argument("--repeats", type=int, default=7)
    args = options.parse_args()
    if args.quick:
        args.questions, args.new, args.repeats = 4, 8, 1
    runs = [RunDirectory(run) for run in args.runs]
    limit = ["--data.limit_validation", str(args.questions)]
    data = QTALECLI(["--config", str(runs[0].require_config()), *limit], "runs").prepare_data()
    rows: list[dict[str, Any]] = []
    for bits in args.bits:
        args.precision = bits
        rows += measured(
            [contender(run, bits, args.engine, args.budget) for run in runs],
            data.questions("validation"),
            args,
        )
    report("runs", rows, [], args.json)


if __name__ == "__main__":
    main()
