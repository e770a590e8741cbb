"""What a run would cost, from its configuration alone: parameters, FLOPs, memory, steps."""

import math
from collections.abc import Callable
from types import SimpleNamespace

from rich.console import Console
from rich.table import Table

from qtale_lightning import checks
from qtale_lightning.configuration import RunConfiguration
from qtale_lightning.evaluation import cost
from qtale_lightning.machine import in_words
from qtale_lightning.memory import PROCESS, quantizing_bytes, trainable_parameters, training_bytes
from qtale_lightning.tasks import TASKS


def print_plan(run: RunConfiguration) -> None:
    """Print the plan of a run as tables."""
    config, model, data, trainer = run.model.shape, run.model, run.datamodule, run.config["trainer"]
    counts, trainable = cost.parameter_counts(config), trainable_parameters(run)
    length = min(data.max_length, 128)
    context = (length + 1) / 2
    # R_target is over all layers, of which those that can't be skipped always execute.
    execution = cost.expected_execution(config, model.target_ratio)
    ratio = model.target_ratio if model.how.decides else sum(execution) / len(execution)

    table = Table(title=f"{model.name}, {model.method}, {data.label}", show_header=False)
    table.add_row("parameters", f"{counts.total:,}")
    table.add_row("  of these routers", f"{counts.routers:,}")
    if dropped := cost.base_layers(config) - config.num_hidden_layers:
        table.add_row("layers dropped", f"{dropped} of {cost.base_layers(config)}")
    table.add_row("trainable parameters", f"{trainable:,}")
    flops = cost.token_flops(config, execution, context)
    table.add_row(f"FLOPs a token at R_target {ratio:.3g} (counted, {length} tokens)", f"{flops:.3g}")
    table.add_row("  share of the dense model's", f"{cost.flops_ratio(config, execution, context):.3f}")
    micro, accumulate = data.batch_size, trainer["accumulate_grad_batches"]
    table.add_row("memory to train, about", _memory(training_bytes, run))
    if run.quantization.bits:
        table.add_row("memory to quantize, about", _memory(quantizing_bytes, run))
    for bits in (16, *run.quantization.bits):
        served = cost.weight_bytes(config, bits, run.quantization.group_size)
        keys = cost.kv_bytes_per_token(config, execution)
        table.add_row(
            f"memory to serve at {bits:g} bits", f"{in_words(served)} + {keys / 1024:.0f} KiB a token"
        )
    table.add_row("effective batch", f"{micro * accumulate * run.devices} on {run.devices} device(s)")
    steps = optimizer_steps(run)
    if (trainer["max_steps"] or -1) < 0:
        table.add_row(
            "optimizer steps, about",
            f"{steps:,} ({trainer['max_epochs']} epochs of {_training_rows(run):,} rows)",
        )
    else:
        table.add_row("optimizer steps", f"{steps:,}")
    table.add_row("training FLOPs, about (every layer computed)", f"{training_flops(run):.2g}")
    Console(markup=False).print(table)


def optimizer_steps(run: RunConfiguration) -> int:
    """Steps of the training: as given, or about, by the public sizes of the training splits."""
    batches = _training_rows(run) // (run.datamodule.batch_size * run.devices)
    return checks.schedule(run.config["trainer"], max(1, batches)).steps


def training_flops(run: RunConfiguration) -> float:
    """FLOPs of the whole training, about: every layer of sequences of up to 128 tokens computed."""
    data, length = run.datamodule, min(run.datamodule.max_length, 128)
    batch = data.batch_size * run.config["trainer"]["accumulate_grad_batches"] * run.devices
    tokens = optimizer_steps(run) * batch * length
    return _training_flops(run.model.shape, (length + 1) / 2) * tokens


def _training_rows(run: RunConfiguration) -> int:
    data = run.datamodule
    return int(sum(min(TASKS[task].rows, data.limit_train or math.inf) for task in data.tasks))


def _training_flops(config: SimpleNamespace, context: float) -> float:
    """A token's FLOPs forward and backward with a frozen base: 2 + 2 for every 2 of the forward pass.

    Masked execution computes every layer; the weights' own gradient, the third part, is needed for LoRA alone.
    """
    return 2 * cost.token_flops(config, cost.expected_execution(config, 1.0), context, head=False)


def _memory(needed: Callable[[RunConfiguration, int], float], run: RunConfiguration) -> str:
    """In the precision that is asked for; in both where that is left to the device, which may be another one."""
    low, full = (in_words(needed(run, width) + PROCESS) for width in (2, 4))
    precision = run.config["trainer"]["precision"]
    if precision is None:
        return f"{low} in bfloat16, {full} in float32 (by the device)"
    return low if str(precision).startswith("bf16") else full
