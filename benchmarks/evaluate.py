"""Questions a second of log-likelihood scoring: ours against lm-evaluation-harness's Hugging Face backend.

    python benchmarks/evaluate.py --data FOLDER [--tasks csqa] [--shots 0 5] [--questions 32] [--dtype float32]
        [--json FILE]

Both get the same real rows as the same texts (the harness's own wording), the same weights and dtype, and end in the
log-likelihood of every choice; tokenization counts on both sides, reading rows and loading the model on neither.

- `dense`: the harness runs Hugging Face's LLaMA; ours is the routed model without routers.
- `routed`: the same model with a router in every layer but two runs in both. The routers are random, and decide at
  θ = 0.5; the row says which share of layers executes.
- The harness has its default options, save that log-probabilities are float32, as ours always are. Its batch size is
  the fastest of `--batch-sizes`, tried on the same rows before; `over 1` is what we gain over its default, batches of
  one request, from that trial. Ours has its default token budget.
- With `--shots`, the same first training rows stand as examples before every question (the harness's `first_n`).
- The limit is the ratio of counted FLOPs: the harness computes a question's prompt, with its examples, once a choice,
  and the head at every token; ours computes a prompt once, examples once for all questions of a sequence, and the head
  where a choice's token is predicted. Padding isn't counted, nor is attention to other branches, which is masked.
- Predictions differ where the choice of highest log-likelihood does; choices closer than 1e-4 nats are left out.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from common import claim, interleaved, median_ratio, report, rows_parser, show
from latency import ROUTER_WIDTH
from torch import nn
from transformers import LlamaForCausalLM

from qtale_lightning.data import EncodedPrompt, Prompt, build_prompt, encode_prompt
from qtale_lightning.data.readers import read
from qtale_lightning.data.splits import Examples
from qtale_lightning.evaluation import cost
from qtale_lightning.evaluation.branches import trees
from qtale_lightning.evaluation.scoring import score
from qtale_lightning.harness import HarnessUnavailableError, harness_model
from qtale_lightning.models import RoutedForCausalLM, route, routed_config
from qtale_lightning.models.sources import load_base, load_tokenizer
from qtale_lightning.tasks import resolve_tasks

FOUR_CHOICES = ("arc_easy", "arc_challenge", "openbookqa")
GOAL = 4.0
TIE = 1e-4


def routed_model(dense: LlamaForCausalLM, name: str, start_layer: int) -> RoutedForCausalLM:
    """The dense one's weights, shared, and random routers from a layer on."""
    shared = {id(parameter): parameter for parameter in dense.parameters()}
    options = {"start_layer": start_layer, "router_width": ROUTER_WIDTH.get(name, 512)}
    config = routed_config(dense.config, **options)
    torch.manual_seed(0)
    model = route(copy.deepcopy(dense, shared), config)
    for layer in model.model.layers[start_layer:]:
        nn.init.normal_(layer.router.out.weight)  # wide enough for decisions that differ between tokens
        nn.init.zeros_(layer.router.out.bias)
    return model.eval()


def requests(prompts: Sequence[Prompt]) -> list[Any]:
    """The harness's requests for every choice of every question."""
    from lm_eval.api.instance import Instance

    pairs = [pair for prompt in prompts for pair in zip(prompt.contexts, prompt.continuations, strict=True)]
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]


def seconds(run: Callable[[int], Any], batch_size: int) -> float:
    """Of one call."""
    started = time.perf_counter()
    run(batch_size)
    return time.perf_counter() - started


def by_question(found: Sequence[tuple[float, bool]], prompts: Sequence[Prompt]) -> list[np.ndarray]:
    """The harness's answers as ours are: log-likelihoods of each question's choices."""
    values = iter(value for value, _ in found)
    return [np.array([next(values) for _ in prompt.contexts]) for prompt in prompts]


def limit(config: Any, questions: Sequence[EncodedPrompt], execution: list[float]) -> float:
    """Counted FLOPs of computing every choice alone over those of computing a prompt once."""
    alone = predicted = choices = 0
    ours = sum(tree.size for tree in trees(questions))
    for question in questions:
        pairs = list(zip(question.contexts, question.continuations, strict=True))
        answers = sum(map(len, question.continuations))
        # The harness, too, computes choices once that differ in their last token only.
        alone += sum(map(len, {context + continuation[:-1] for context, continuation in pairs}))
        predicted += answers
        choices += len(pairs)
    token = cost.token_flops(config, execution, alone / choices / 2, head=False)
    head = cost.head_flops(config)
    return alone * (token + head) / (ours * token + predicted * head)


def differing(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> int:
    """Questions whose predicted choice differs, ties left out."""
    gaps = [np.diff(np.sort(scores)[-2:])[0] for scores in theirs]
    return sum(
        int(one.argmax() != other.argmax() and gap >= TIE)
        for one, other, gap in zip(ours, theirs, gaps, strict=True)
    )


def measured(
    model: RoutedForCausalLM,
    peer: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    batch_sizes: Sequence[int],
    repeats: int,
) -> dict[str, Any]:
    """A row: one task's questions by both, `peer` being what the harness runs."""
    asked = requests(prompts)

    def ours() -> Any:
        encoded = [encode_prompt(tokenizer, prompt, 2048) for prompt in prompts]
        return score(model, encoded)

    def harness(batch_size: int) -> Any:
        return harness_model(peer, tokenizer, batch_size).loglikelihood(asked, disable_tqdm=True)

    harness(batch_sizes[0])  # the first call of all is slow
    tried = {size: seconds(harness, size) for size in (1, *batch_sizes)}
    best = min(batch_sizes, key=lambda size: tried[size])
    times = interleaved({"ours": ours, "harness": lambda: harness(best)}, repeats, warmup=1)
    scores, answers = ours(), by_question(harness(best), prompts)
    encoded = [encode_prompt(tokenizer, prompt, 2048) for prompt in prompts]
    ratios = [theirs / own for theirs, own in zip(times["harness"], times["ours"], strict=True)]
    return {
        "questions": len(prompts),
        "choices": sum(len(prompt.contexts) for prompt in prompts) / len(prompts),
        "executed": sum(scores.execution) / len(scores.execution),
        "harness batch": best,
        "harness q/s": len(prompts) / statistics.median(times["harness"]),
        "ours q/s": len(prompts) / statistics.median(times["ours"]),
        "speed-up": median_ratio(times["harness"], times["ours"]),
        "spread": f"{min(ratios):.2f} to {max(ratios):.2f}",
        "over 1": tried[1] / statistics.median(times["ours"]),
        "limit": limit(model.config, encoded, scores.execution),
        "differing": differing(scores.loglikelihoods, answers),
        "harness acc %": 100 * correct(answers, prompts),
        "ours acc %": 100 * correct(scores.loglikelihoods, prompts),
    }


def correct(scores: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> float:
    """The harness's `acc`."""
    return float(np.mean([s.argmax() == prompt.label for s, prompt in zip(scores, prompts, strict=True)]))


def main() -> None:
    """Measure and report."""
    options = rows_parser(__doc__)
    options.add_argument("--questions", type=int, default=32, help="validation questions of each task")
    options.add_argument("--shots", type=int, nargs="+", default=[0, 5], help="examples before each question")
    options.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 16, 32], help="the harness's")
    options.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options.add_argument("--forms", nargs="+", default=["dense", "routed"], choices=("dense", "routed"))
    options.add_argument("--repeats", type=int, default=3)
    args = options.parse_args()
    if args.quick:
        args.model, args.tasks, args.questions, args.repeats, args.batch_sizes = "tiny", "facts", 4, 1, [4, 8]
    elif args.data is None:
        print("skipped: give the folder of the real rows with --data or QTALE_DATA")
        return
    tokenizer, dense = (
        load_tokenizer(args.model),
        load_base(args.model, dtype=getattr(torch, args.dtype)).eval(),
    )
    try:
        harness_model(dense, tokenizer, 1)
    except HarnessUnavailableError as error:
        print(f"skipped: {error}")
        return
    plain = routed_model(dense, args.model, dense.config.num_hidden_layers)
    contenders = {"dense": (plain, dense)}
    if "routed" in args.forms:
        routed = routed_model(dense, args.model, 2)
        contenders["routed"] = (routed, routed)
    rows = []
    for task in resolve_tasks(args.tasks):
        questions = read(task, args.data and str(args.data), "validation", 0)[: args.questions]
        for shots in args.shots:
            examples = Examples(task, args.data and str(args.data), shots)
            prompts = [build_prompt(one, "cloze", shots=examples.of(one)) for one in questions]
            for form in args.forms:
                with torch.inference_mode():
                    row = measured(*contenders[form], tokenizer, prompts, args.batch_sizes, args.repeats)
                rows.append({"task": task, "shots": shots, "form": form, "dtype": args.dtype} | row)
                show(rows[-1])
    claims = []
    for row in rows:
        if row["form"] == "dense" and (row["task"] in FOUR_CHOICES or args.quick):
            what = f"{row['task']}, {row['shots']} shots"
            faster = f"questions a second, ours over the harness, {what}"
            claims += [
                claim(f"{faster}, its fastest batch", row["speed-up"], GOAL, "higher"),
                claim(f"{faster}, its default batch", row["over 1"], GOAL, "higher"),
                claim(f"predictions that differ, {what}", row["differing"], 0, "lower"),
            ]
    report("evaluate", rows, claims, args.json)


if __name__ == "__main__":
    main()
