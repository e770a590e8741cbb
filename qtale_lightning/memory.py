"""What a run needs of memory, from its configuration alone; held to a run of LLaMA-2-7B in benchmarks/README.md."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from qtale_lightning.architectures import architecture_of
from qtale_lightning.configuration import RunConfiguration
from qtale_lightning.evaluation import cost

PROCESS = 6 * 2**30 // 10
"""Bytes that Python, PyTorch, Lightning and transformers take in main memory besides: of a run of `tiny`, measured."""


def trainable_parameters(run: RunConfiguration) -> int:
    """Routers, stand-ins and LoRA, rank · (in + out) of every targeted projection; or all weights."""
    config, lora = run.model.shape, run.model.lora_options
    counts, shapes = cost.parameter_counts(config), cost.linear_shapes(config)
    if run.model.train_all:
        return counts.total
    adapted = sum(lora["rank"] * sum(shapes[name]) for name in lora["targets"])
    return counts.routers + counts.stand_ins + config.num_hidden_layers * adapted


def training_bytes(run: RunConfiguration, width: int) -> float:
    """Weights, optimizer and activations of a micro-batch, without activation checkpointing.

    Frozen weights take `width` bytes (2 in bf16, 4 in float32); a trainable one 16 (value, gradient and AdamW's two
    moments in float32).
    """
    trainable = trainable_parameters(run)
    tokens = min(run.datamodule.max_length, 128)
    frozen = max(0, cost.parameter_counts(run.model.shape).total - trainable) * width
    batch = run.datamodule.batch_size * tokens
    lora = {} if run.model.train_all else run.model.lora_options
    return frozen + 16 * trainable + batch * activation_bytes(run.model.shape, tokens, width, lora)


def activation_bytes(config: SimpleNamespace, length: int, width: int, lora: Mapping[str, Any]) -> float:
    """What a token of a sequence of `length` leaves for the backward pass, in all layers.

    In each, of the hidden width D: 6 numbers in float32 (residual stream, norms), of which mixed precision has one in
    bfloat16; of the inner width: gate, up and their product; for each head and key of masked attention: scores,
    probabilities and what eviction leaves of them, of which mixed precision keeps two in float32; of the router's
    width: 4 in float32. And what LoRA keeps (with its dropout at the output): the inputs of its projections, once where
    they share one, in float32 of its rank, and a byte for each output.
    """
    low = width == 2
    hidden = (22 if low else 24) * config.hidden_size
    inner = 3 * width * config.intermediate_size
    scores = (10 if low else 12) * config.num_attention_heads * length
    routers = 16 * (config.router_width or 0) * len(cost.routed_layers(config)) / config.num_hidden_layers
    return config.num_hidden_layers * (hidden + inner + scores + routers + _lora_bytes(config, width, lora))


def _lora_bytes(config: SimpleNamespace, width: int, lora: Mapping[str, Any]) -> int:
    """What LoRA keeps of a token in a layer for the backward pass; nothing where there is none."""
    if not lora:
        return 0
    family, total = architecture_of(config), 0
    shapes = family.shapes(config)
    for mapping in family.mappings:  # its linears share an input
        adapted = [shapes[name] for name in mapping.linears if name.rpartition(".")[2] in lora["targets"]]
        total += width * max((inputs for _, inputs in adapted), default=0)
        total += sum(outputs + 4 * lora["rank"] for outputs, _ in adapted)
    return total


def quantizing_bytes(run: RunConfiguration, width: int) -> float:
    """The exported model in `width` bytes, the packed one beside it, and what rounds and packs the largest linear.

    That takes about six numbers of float32 a weight, measured; no search of a layer takes as much as the packed model
    that follows it.
    """
    config, quantization = run.model.shape, run.quantization
    counts = cost.parameter_counts(config)
    linears = sum(counts.linears.values())
    rest = cost.weight_bytes(config, 16) - 2 * linears
    packed = cost.weight_bytes(config, max(quantization.bits), quantization.group_size) - rest
    largest = max(outputs * inputs for outputs, inputs in cost.linear_shapes(config).values())
    return width * (counts.total - counts.routers) + 4 * counts.routers + packed + 24 * largest
