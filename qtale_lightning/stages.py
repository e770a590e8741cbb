"""The stages after training, each on a run directory: export, quantize, sweep. None repeats what is there."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import AutoModelForCausalLM

from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.evaluation import cost
from qtale_lightning.evaluation.scoring import score, task_accuracy
from qtale_lightning.evaluation.threshold import RULE, RULE_IN_WORDS, select
from qtale_lightning.files import replacing
from qtale_lightning.models.modeling import RoutedLlamaForCausalLM
from qtale_lightning.models.routing import Routing
from qtale_lightning.models.sources import source_name
from qtale_lightning.module import QTALEModule
from qtale_lightning.quantization import awq
from qtale_lightning.quantization.mappings import quantized_linear_names
from qtale_lightning.quantization.result import AWQSearch, apply
from qtale_lightning.quantization.rtn import check_quantizable
from qtale_lightning.report.results import Evaluation, load_results, update_results, upsert_evaluation
from qtale_lightning.run import RunDirectory

log = logging.getLogger(__name__)
console = Console()

ENGINE = {True: "none", False: "native"}  # by: is it the full precision?


@contextmanager
def _progress(description: str, total: int) -> Iterator[Any]:
    """A progress bar with the time left; yields the function that advances it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count=1: bar.advance(task, count)


# ------------------------------------------------------------------------------------------------------ export


def export(
    run: RunDirectory, module: QTALEModule, checkpoint: dict[str, Any] | None, dtype: torch.dtype
) -> None:
    """Merge the best checkpoint in float32 and save it in Hugging Face format, with routers and their configuration.

    Args:
        run: Where ``model/`` goes; nothing is done if it is there.
        module: A fresh module of the run's configuration, its model not loaded yet; it is used up.
        checkpoint: Trainable weights, as in the checkpoint's ``state_dict``; None exports the untrained model.
        dtype: Of the saved weights; routers stay in float32.

    Raises:
        ValueError: The checkpoint doesn't fit, or merging changes the logits by more than rounding.
    """
    if run.model().is_dir():
        return
    module.configure_model()
    if checkpoint is not None:
        module.load_state_dict(checkpoint)
    module.eval()
    probe = torch.arange(2, 34).unsqueeze(0) % module.model.config.vocab_size
    with torch.no_grad():
        before = module.model(probe, routing=Routing(threshold=0.0)).logits
        model = module.merge()
        after = model(probe, routing=Routing(threshold=0.0)).logits
    # float32 merging moves logits of size ~10 by ~1e-5; anything near 1e-2 is not rounding.
    if (drift := float((before - after).abs().max())) > 1e-2:
        raise ValueError(
            f"merging LoRA changed logits by {drift:.3g}, more than rounding: the checkpoint is not sound"
        )
    for name, parameter in model.named_parameters():
        if ".router." not in name:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    with replacing(run.model()) as folder:
        model.save_pretrained(folder)
        module.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(_model_card(run, module), encoding="utf-8")
    log.info("exported %s (merging moved logits by %.2g at most)", run.model(), drift)


def _model_card(run: RunDirectory, module: QTALEModule) -> str:
    config = module.model.config
    return (
        f"---\nlibrary_name: transformers\ntags: [qtale, routed-llama]\n---\n# {run.root.name}\n\n"
        f"{module.name} ({source_name(module.name, module.path)}), fine-tuned with method `{module.method}`; LoRA is "
        f"merged. Layers {config.start_layer} to {config.num_hidden_layers - 1} have routers of width "
        f"{config.router_width}: a token executes such a layer iff p(execute) ≥ θ = {config.threshold} "
        "(`config.threshold`; 0 is the dense model).\n\n"
        "```python\nimport qtale_lightning  # registers the model\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("model")\n'
        'tokenizer = AutoTokenizer.from_pretrained("model")\n```\n\n'
        "Results: `../results.md`; configuration: `../config.yaml`.\n"
    )


def load_exported(run: RunDirectory, bits: int = 16) -> RoutedLlamaForCausalLM:
    """The run's model at a precision, in evaluation mode, on a GPU where there is one.

    Raises:
        FileNotFoundError: That precision isn't there; the message says which stage makes it.
    """
    folder = run.model(bits)
    if not folder.is_dir():
        stage = "`make train`" if bits == 16 else "`python -m qtale_lightning quantize <run>`"
        raise FileNotFoundError(f"{folder} isn't there: {stage} makes it.")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------------------------------------------- quantize


def quantize(
    run: RunDirectory, data: CommonsenseDataModule, bits: Sequence[int], group_size: int, sequences: int
) -> None:
    """AWQ of the exported model at each of ``bits``, calibrated on training sequences with routing on.

    Saves what the search found (``awq-search-Nbit.safetensors``) and the model with the quantized weights' values
    (``model-awq-Nbit/``); routers, embeddings and head keep full precision.

    Args:
        run: With an exported model.
        data: Gives the calibration sequences.
        bits: Precisions; those already there are skipped.
        group_size: Weights of an input row that share a scale.
        sequences: Number of training sequences (prompt and answer) to calibrate on.

    Raises:
        ValueError: The group size doesn't divide a width, or differs from that of a precision already there.
    """
    missing = [b for b in bits if not run.model(b).is_dir()]
    for b in set(bits) - set(missing):
        there = AWQSearch.load(run.search(b)).group_size
        if there != group_size:
            raise ValueError(
                f"{run.model(b)} has group size {there}, not {group_size}: remove it to quantize again"
            )
    if not missing:
        return
    started = time.perf_counter()
    searches = _search(run, data, missing, group_size, sequences)
    assert data.tokenizer is not None  # calibration sequences were made with it
    for b, search in searches.items():
        quantized = load_exported(run)
        apply(quantized, search)
        search.save(run.search(b))
        with replacing(run.model(b)) as folder:
            quantized.save_pretrained(folder)
            data.tokenizer.save_pretrained(folder)
    names = ", ".join(str(b) for b in missing)
    console.print(f"AWQ at {names} bits, group size {group_size}: {time.perf_counter() - started:.0f} s")


def _search(
    run: RunDirectory, data: CommonsenseDataModule, bits: Sequence[int], group_size: int, sequences: int
) -> dict[int, AWQSearch]:
    """AWQ's search at each precision; the model it runs on is freed before the quantized ones are loaded."""
    model = load_exported(run)
    shapes = {}
    for name in quantized_linear_names(model):
        rows, columns = model.get_parameter(f"{name}.weight").shape
        shapes[name] = (rows, columns)
    for b in bits:
        check_quantizable(shapes, b, group_size)
    ids = data.calibration_sequences(sequences)
    longest = max(map(len, ids))
    batch = torch.tensor([s + [0] * (longest - len(s)) for s in ids], device=model.device)
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in ids], device=model.device)
    log.info("calibrating on %d training sequences, %d tokens, routing on", len(ids), int(mask.sum()))
    with _progress("AWQ search, layers", len(model.model.layers)) as advance:
        return awq.search(
            model,
            lambda: model.model(batch, attention_mask=mask, use_cache=False),
            bits,
            group_size,
            progress=lambda *_: advance(),
        )


# ------------------------------------------------------------------------------------------------------- sweep


def evaluate(
    run: RunDirectory,
    data: CommonsenseDataModule,
    model: RoutedLlamaForCausalLM,
    bits: int,
    theta: float | None,
    split: Literal["calibration", "validation"],
    group_size: int,
) -> Evaluation:
    """Score a split at one precision and θ, and keep the row in ``results.json``; a row already there is returned."""
    questions = data.questions(split)
    protocol = data.protocol() | {"scoring": "log-likelihood", "execution": "packed"}
    for known in load_results(run.root)["evaluation"]:
        key = (known["bits"], known["theta"], known["split"], known["examples"], known["protocol"])
        if key == (bits, theta, split, len(questions), protocol):
            return known
    theta_text = "" if theta is None else f", θ = {theta:g}"
    with _progress(f"{bits} bits{theta_text}, {split}", len(questions)) as advance:
        started = time.perf_counter()
        scores = score(model, questions, theta, on_progress=advance)
        seconds = time.perf_counter() - started
    tasks = list(dict.fromkeys(question.task for question in questions))
    accuracy: dict[str, Any] = {}
    for task in tasks:
        chosen = [i for i, question in enumerate(questions) if question.task == task]
        accuracy[task] = task_accuracy(
            [questions[i] for i in chosen],
            [scores.loglikelihoods[i] for i in chosen],
            protocol["metrics"][task],
        )
    context = (
        sum(len(c) for q in questions for c in q.contexts) / sum(len(q.contexts) for q in questions) + 1
    ) / 2
    row: Evaluation = {
        "bits": bits,
        "engine": ENGINE[bits == 16],
        "theta": theta,
        "split": split,
        "examples": len(questions),
        "execution_ratio": sum(scores.execution) / len(scores.execution),
        "execution_ratio_per_layer": scores.execution,
        "flops_ratio": cost.flops_ratio(model.config, scores.execution, context),
        "accuracy": accuracy,
        "average": _mean(accuracy, "value"),
        "average_stderr": _mean_error(accuracy, "stderr"),
        "average_nll": _mean(accuracy, "nll"),
        "average_nll_stderr": _mean_error(accuracy, "nll_stderr"),
        "weight_bytes": cost.weight_bytes(model.config, bits, group_size),
        "seconds": seconds,
        "protocol": protocol,
    }
    upsert_evaluation(run.root, row)
    if split == "validation":
        console.print(
            f"{bits:>2} bits{theta_text}: accuracy {100 * row['average']:.1f} ± {100 * row['average_stderr']:.1f} %, "
            f"nll {row['average_nll']:.3f}, execution ratio {row['execution_ratio']:.3f}, {seconds:.0f} s"
        )
    return row


def _mean(accuracy: dict[str, Any], key: str) -> float:
    return sum(task[key] for task in accuracy.values()) / len(accuracy)


def _mean_error(accuracy: dict[str, Any], key: str) -> float:
    """Standard error of a mean over tasks with independent questions."""
    return float(sum(task[key] ** 2 for task in accuracy.values()) ** 0.5 / len(accuracy))


def sweep(
    run: RunDirectory,
    data: CommonsenseDataModule,
    bits: Sequence[int],
    thresholds: Sequence[float],
    group_size: int,
) -> None:
    """Every precision × every θ, on calibration and validation questions; then the θ of each precision.

    θ is selected on calibration questions, which come from the training split and were not trained on; what it
    gives is then read off the validation questions. A model without routers has one row a precision, and no θ.
    """
    selected = []
    for b in (16, *sorted(bits, reverse=True)):
        model = load_exported(run, b)
        grid: list[float | None] = (
            [*sorted(thresholds, reverse=True)] if model.config.routed_layers else [None]
        )
        validation = {theta: evaluate(run, data, model, b, theta, "validation", group_size) for theta in grid}
        if grid == [None]:
            chosen, rule = validation[None], "no routers"
        else:
            rows = [evaluate(run, data, model, b, theta, "calibration", group_size) for theta in grid]
            chosen, rule = validation[select(rows)["theta"]], f"{RULE}: {RULE_IN_WORDS}"
        means = {key: chosen[key] for key in ("average", "average_stderr", "average_nll", "execution_ratio")}
        selected.append({key: chosen[key] for key in ("bits", "engine", "theta")} | means | {"rule": rule})
    update_results(run.root, "selected", selected)
