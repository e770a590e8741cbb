"""What the benchmarks share: timing side by side, hardware and versions, the table and its JSON."""

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from qtale_lightning import cpu
from qtale_lightning.allocator import keep_freed_memory
from qtale_lightning.files import replacing
from qtale_lightning.finite import as_json
from qtale_lightning.results.metadata import hardware, package_versions

Key = TypeVar("Key", bound=Hashable)

# Of a processor's flags, those that decide how fast it multiplies.
FLAGS = "avx2 fma f16c avx_vnni avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_int8 amx_bf16"
FLAGS += " asimddp i8mm bf16 sve"


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    keep_freed_memory()  # for all contenders alike
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, help="write the measurements to this file")
    made.add_argument(
        "--quick", action="store_true", help="a small model and few repeats, to see that it runs"
    )
    return made


def rows_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark on real rows: :func:`parser`'s, the model, the folder of the rows and the tasks."""
    made = parser(description)
    made.add_argument("--model", default="smollm2-135m")
    made.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("QTALE_DATA"),
        help="folder of <task>/train.jsonl and validation.jsonl (environment: QTALE_DATA); needed",
    )
    made.add_argument("--tasks", default="csqa")
    return made


def interleaved(
    contenders: Mapping[Key, Callable[[], Any]],
    repeats: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, list[float]]:
    """Seconds of each contender, one after the other in every round, so that drift of the machine hits all alike."""
    seconds: dict[Key, list[float]] = {name: [] for name in contenders}
    for round_ in range(warmup + repeats):
        for name, run in contenders.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = clock()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ >= warmup:
                seconds[name].append(clock() - started)
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds of the ratio of two contenders' seconds in the same round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def show(row: Mapping[str, Any]) -> None:
    """Print a row as soon as it is measured: a benchmark takes minutes."""
    print({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()}, flush=True)


def claim(name: str, value: float, goal: float, better: str) -> dict[str, Any]:
    """A goal and what was measured; ``better`` is "higher" or "lower"."""
    met = value >= goal if better == "higher" else value <= goal
    return {"claim": name, "value": value, "goal": goal, "better": better, "met": met}


def report(
    name: str, rows: Sequence[Mapping[str, Any]], claims: Sequence[Mapping[str, Any]], target: Path | None
) -> None:
    """Print the table, hardware and claims; write them as JSON where a file is given.

    Columns of dicts are in the JSON only.
    """
    console = Console(width=None if sys.stdout.isatty() else 200)  # a log's table keeps its columns
    table = Table(title=name, caption=hardware())
    shown = [column for column, value in rows[0].items() if not isinstance(value, dict)]
    for column in shown:
        table.add_column(column, justify="right" if isinstance(rows[0][column], float) else "left")
    for row in rows:
        values = (row[column] for column in shown)
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values))
    console.print(table)
    for one in claims:
        sign = "≥" if one["better"] == "higher" else "≤"
        met = "met" if one["met"] else "not met"
        console.print(f"{one['claim']}: {one['value']:.3f} (goal {sign} {one['goal']:g}: {met})")
    write(name, rows, claims, target)


def write(
    name: str, rows: Sequence[Mapping[str, Any]], claims: Sequence[Mapping[str, Any]], target: Path | None
) -> None:
    """Write measurements, with hardware and versions, as JSON where a file is given."""
    if target is not None:
        content = {
            "benchmark": name, "hardware": hardware(), "processor": processor(), "versions": package_versions(),
            "rows": list(rows), "claims": list(claims),
        }  # fmt: skip
        with replacing(target) as temporary:
            temporary.write_text(json.dumps(as_json(content), indent=1, allow_nan=False), encoding="utf-8")


def processor() -> str:
    """Which processor, as Linux knows it: family and model tell what a name like "AMD EPYC" doesn't, and its flags."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
        return found.group(1) if found else "?"

    flags = {*field("flags").split(), *field("Features").split()}
    known = " ".join(flag for flag in FLAGS.split() if flag in flags)
    return f"{field('model name')}, family {field('cpu family')}, model {field('model')}: {known}"


def instructions() -> str:
    """What of the processor our computing uses in this process: by operations of ours, or by PyTorch's alone."""
    return (
        f"ours: {cpu.instruction_set()}"
        if cpu.available()
        else f"PyTorch: {torch.backends.cpu.get_cpu_capability()}"
    )
