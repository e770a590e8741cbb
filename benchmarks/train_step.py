"""Seconds of a training step: QTALE's (router, Gumbel gates, three losses) against dense LoRA as people run it.

The peer is Hugging Face's LLaMA with peft, same batch, same LoRA, same precision and optimizer:

    python benchmarks/train_step.py [--model smollm2-135m] [--batch 16] [--length 64] [--json FILE]
    python benchmarks/train_step.py --model llama2-7b --layers 32 --router-width 512 --device cuda

With `--layers` the model has so many layers of its shape, with random weights.

`dense LoRA, head on answers` is that peer with this project's one trick for answer-only losses (the head where an
answer token is predicted), to see what the routers themselves cost. The theoretical limit of QTALE's step is the
dense step and the routers' counted FLOPs: training computes every layer.
"""

import statistics
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from common import claim, interleaved, median_ratio, parser, report
from latency import dense_model
from peft import LoraConfig, get_peft_model
from torch import Tensor

from qtale_lightning.evaluation import cost
from qtale_lightning.memory import training_bytes
from qtale_lightning.models.routing import Routing
from qtale_lightning.models.sources import load_base
from qtale_lightning.module import QTALEModule

ANSWER = 6  # tokens of an answer, about those of the cloze tasks


def make_base(args: Any) -> Any:
    """The base model in bfloat16."""
    if args.layers is None:
        return load_base(args.model, dtype=torch.bfloat16).to(args.device)
    return dense_model(args.model, args.layers, args.device)


def memory(device: str) -> int:
    """Bytes of tensors on a GPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def peak(device: str, step: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that a first step leaves (the optimizer's states), and those that a later one has more at its peak."""
    before = memory(device)
    step()
    after = memory(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step()
    return after - before, torch.cuda.max_memory_allocated() - after if device == "cuda" else 0


def planned(module: QTALEModule, batch: int, length: int) -> float:
    """Bytes that `make plan` says of such a training in bfloat16."""
    model = SimpleNamespace(shape=module.model.config, lora_options=module.lora_options, train_all=False)
    rows = SimpleNamespace(batch_size=batch, max_length=length)
    return training_bytes(SimpleNamespace(model=model, datamodule=rows), 2)  # type: ignore[arg-type]


def make_batch(vocabulary: int, batch: int, length: int) -> dict[str, Tensor]:
    """Random tokens in rows of 3/4 to 4/4 of ``length``, right-padded, with an answer at each end."""
    lengths = torch.linspace(0.75 * length, length, batch).long()
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(10, vocabulary, (batch, length))
    answer = mask.bool() & (torch.arange(length) >= (lengths - ANSWER)[:, None])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~answer, -100)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and report."""
    options = parser(__doc__)
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--router-width", type=int, default=128)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--length", type=int, default=64)
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--device", default="cpu")
    options.add_argument("--layers", type=int)
    args = options.parse_args(arguments)
    if args.quick:
        args.model, args.repeats, args.router_width = "tiny", 3, 32
    device = args.device
    torch.manual_seed(0)

    ours = QTALEModule(name=args.model, router_width=args.router_width, lambda_entropy=0.5)
    ours.attach(make_base(args))
    ours.to(device).train()
    static = memory(device)
    lora: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
    }
    base = make_base(args)
    dense = get_peft_model(base, LoraConfig(**lora)).train()  # LoRA goes into `base` itself
    batch = make_batch(dense.config.vocab_size, args.batch, args.length)
    found = ours.on_before_batch_transfer(batch, 0)
    batch, found = ({name: value.to(device) for name, value in one.items()} for one in (batch, found))

    def trainer(model: torch.nn.Module, loss: Any) -> Any:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step() -> None:
            with torch.autocast(device, dtype=torch.bfloat16):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def answers_only() -> Tensor:
        hidden = base.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
        targets = batch["labels"][:, 1:]
        logits = base.lm_head(hidden[:, :-1][targets != -100])
        return torch.nn.functional.cross_entropy(logits.float(), targets[targets != -100])

    contenders = {
        "dense LoRA, Hugging Face + peft": trainer(dense, lambda: dense(**batch, use_cache=False).loss),
        "dense LoRA, head on answers": trainer(dense, answers_only),
        "QTALE": trainer(ours.model, lambda: ours.losses(found, Routing(), 0.5).total),
    }
    peaks = {name: peak(device, step) for name, step in contenders.items()}
    seconds = interleaved(contenders, args.repeats)
    config = ours.model.config
    dense_flops = cost.token_flops(config, [1.0] * config.num_hidden_layers, args.length / 2, head=False)
    # Relative to the same dense step: routers' share, forward and backward (3 of 2 passes of a frozen layer's 2).
    limit = 1 + len(config.routed_layers) * cost.router_flops(config) * 1.5 / dense_flops
    peer = seconds["dense LoRA, Hugging Face + peft"]
    same_head = seconds["dense LoRA, head on answers"]
    rows = [
        {
            "step": name,
            "median s": statistics.median(values),
            "fastest s": min(values),
            "slowest s": max(values),
            "of Hugging Face + peft": median_ratio(values, peer),
            "of head on answers": median_ratio(values, same_head),
            "counted limit": limit if name == "QTALE" else 1.0,
            "GB more at its peak": peaks[name][1] / 1e9,
        }
        for name, values in seconds.items()
    ]
    claims = [
        claim("QTALE step over Hugging Face + peft step", median_ratio(seconds["QTALE"], peer), 1.25, "lower")
    ]
    expected, (states, more) = planned(ours, args.batch, args.length), peaks["QTALE"]
    if device == "cuda":
        what = "QTALE's memory over `make plan`'s"
        claims.append(claim(what, (static + states + more) / expected, 1.1, "lower"))
    report("train_step", rows, claims, args.json)


if __name__ == "__main__":
    main()
