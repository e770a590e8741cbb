"""``doctor``: what this machine has of what is needed, and what a model would lack here."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from qtale_lightning.configuration import PlannedRun
from qtale_lightning.evaluation.cost import parameter_counts
from qtale_lightning.experiments import find
from qtale_lightning.machine import Finding, Mark, free_disk, free_memory, hub, hub_cache, in_words, machine
from qtale_lightning.memory import PROCESS, training_bytes
from qtale_lightning.models.locations import Location, locate


def examine(model: str | None, options: Sequence[str], out: Path) -> int:
    """Print what this machine has, and what a model would lack here.

    Args:
        model: Of experiments/models.
        options: Of its run, as on `fit`'s command line.
        out: Folder of the runs.

    Returns:
        The exit status: 1 where something is missing, else 0.
    """
    run = None if model is None else planned(model, options)
    findings = [*machine(out), *([] if run is None else needs(run))]
    show(findings)
    return int(any(finding.mark == "missing" for finding in findings))


def planned(model: str, options: Sequence[str]) -> PlannedRun:
    """A model's usual configuration: that of ``make train MODEL=…``, where its files are at hand."""
    files = [
        find(f"experiments/{file}") for file in ("base.yaml", f"models/{model}.yaml", "methods/qtale.yaml")
    ]
    configs = [part for file in files if file.is_file() for part in ("--config", str(file))]
    return PlannedRun(
        [*configs, "--model.name", model, *options], "python -m qtale_lightning doctor --model NAME"
    )


def show(findings: Iterable[Finding]) -> None:
    """Print findings as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    colours = {"ok": "green", "warn": "yellow", "missing": "red"}
    for finding in findings:
        advice = f"\n→ {finding.advice}" if finding.advice else ""
        table.add_row(Text(finding.mark, colours[finding.mark]), finding.thing, finding.found + advice)
    Console(markup=False, highlight=False).print(table)


def needs(run: PlannedRun) -> Iterator[Finding]:
    """What a configuration needs: weights, memory and rows."""
    yield weights(run)
    yield memory_to_train(run)
    for task in run.datamodule.tasks:
        yield rows(task, run.datamodule.root)


def weights(run: PlannedRun) -> Finding:
    """Whether a model's weights are here, or can be brought."""
    model, thing = run.model, f"weights of {run.model.name}"
    location = locate(model.name, model.path, model.revision)
    if location is None:
        return Finding("ok", thing, "made on the spot")
    if location.folder is not None:
        return Finding("ok", thing, str(location))
    if in_cache(location):
        return Finding("ok", thing, f"{location}, in the hub's cache")
    counts, free = parameter_counts(model.shape), free_disk(hub_cache())
    needed = 2 * (counts.total - counts.routers)
    if hub().mark != "ok":
        return Finding(
            "missing", thing, f"{location} isn't in the hub's cache", f"connect to it. {location.otherwise}"
        )
    if free < needed:
        found = f"{location}: {in_words(needed)} to download, {in_words(free)} free"
        return Finding("missing", thing, found, "name another cache by HF_HOME")
    return Finding("ok", thing, f"{location}, {in_words(needed)} to download")


def in_cache(location: Location) -> bool:
    """Whether the hub's cache has the weights."""
    from huggingface_hub import try_to_load_from_cache

    found = (
        try_to_load_from_cache(location.hub, name, revision=location.revision)
        for name in ("model.safetensors", "model.safetensors.index.json")
    )
    return any(isinstance(path, str) for path in found)


def memory_to_train(run: PlannedRun) -> Finding:
    """Whether training fits, by the estimate of ``plan``."""
    import torch

    from qtale_lightning.precision import training_precision

    trainer, free, kind = run.config["trainer"], free_memory(), "memory"
    precision = trainer["precision"] or training_precision(trainer["accelerator"])
    needed = training_bytes(run, 2 if str(precision).startswith("bf16") else 4) + PROCESS
    if torch.cuda.is_available():
        free = max(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
        kind = "GPU memory"
    found = f"about {in_words(needed)} in {precision}; {in_words(free)} of {kind} are free"
    if needed <= free:
        return Finding("ok", "training", found)
    advice = "lower --data.batch_size or --data.max_length, or share it among GPUs (DEVICES=… of make)"
    return Finding("missing", "training", found, advice)


def rows(task: str, root: str | None) -> Finding:
    """Whether a task's rows are here, or can be brought."""
    from qtale_lightning.tasks import TASKS

    thing, source = f"rows of {task}", TASKS[task].hub
    if TASKS[task].generate is not None:
        return Finding("ok", thing, "built in")
    if root is not None:
        folder = Path(root) / task
        absent = [
            f"{name}.jsonl" for name in ("train", "validation") if not (folder / f"{name}.jsonl").is_file()
        ]
        mark: Mark = "missing" if absent else "ok"
        return Finding(mark, thing, f"{folder}" + (f" has no {' and no '.join(absent)}" if absent else ""))
    if source is None:
        return Finding("missing", thing, "it has local rows only", "give --data.root FOLDER")
    kept = hub_cache() / f"datasets--{source.path.replace('/', '--')}" / "snapshots" / source.revision
    if kept.is_dir():
        return Finding("ok", thing, f"{source.path}, in the hub's cache")
    if hub().mark != "ok":
        return Finding(
            "missing",
            thing,
            f"{source.path} isn't in the hub's cache",
            "connect to it, or give --data.root FOLDER",
        )
    return Finding("ok", thing, f"{source.path}, to download")
