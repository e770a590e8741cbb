"""All trials of a sweep in one table, from what they kept: Markdown, CSV, and a figure."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from qtale_lightning.files import replacing
from qtale_lightning.report import markdown
from qtale_lightning.report.notes import theta_text
from qtale_lightning.sweeps.figure import plot_parallel
from qtale_lightning.sweeps.trial import RECORD

MEASURED = {
    "bits": "bits",
    "engine": "engine",
    "theta": "θ",
    "execution_ratio": "layers executed",
    "flops_ratio": "counted FLOPs",
    "average": "average %",
    "average_nll": "NLL",
    "weight_bytes": "weights MB",
    "seconds": "measured s",
}
"""What a row of the table says of an evaluation, and its heading."""


def records(folder: Path) -> list[dict[str, Any]]:
    """What the trials of a sweep kept, in order of their parameters.

    Raises:
        FileNotFoundError: There are none.
    """
    found = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob(f"*/{RECORD}")]
    if not found:
        raise FileNotFoundError(f"{folder} holds no runs of a sweep (<run>/{RECORD})")
    return sorted(found, key=lambda record: [_sortable(value) for value in record["parameters"].values()])


def sweep_frame(kept: list[dict[str, Any]]) -> pd.DataFrame:
    """A row for each trial and precision: its parameters, what was measured (as in results.json), and the command."""
    rows = []
    for record in kept:
        for row in record["outcome"]:
            measured = {f"measured.{name}": value for name, value in row.items()}
            rows.append({**record["parameters"], **measured, "command": record["command"]})
    return pd.DataFrame(rows)


def write_table(folder: Path, name: str) -> Path:
    """Writes ``sweep.md``, ``sweep.csv`` and, from two trials on, ``sweep.png`` and ``sweep.pdf``; returns the page.

    Raises:
        FileNotFoundError: as `records`.
    """
    kept = records(folder)
    frame = sweep_frame(kept)
    with replacing(folder / "sweep.csv") as temporary:
        frame.to_csv(temporary, index=False)
    figure = plot_parallel(frame, list(kept[0]["parameters"])) if len(frame) > 1 else None
    for kind in ("png", "pdf") if figure is not None else ():
        with replacing(folder / f"sweep.{kind}") as temporary:
            figure.savefig(temporary, format=kind, dpi=160)  # type: ignore[union-attr]
    with replacing(folder / "sweep.md") as temporary:
        temporary.write_text(_page(name, kept, figure is not None), encoding="utf-8")
    return folder / "sweep.md"


def _page(name: str, kept: list[dict[str, Any]], drawn: bool) -> str:
    parameters = list(dict.fromkeys(key for record in kept for key in record["parameters"]))
    said = {key.rpartition(".")[2] for key in parameters}  # by the parameters already
    measured = [key for key in MEASURED if key not in said]
    lines = [
        [*(record["parameters"].get(key, "") for key in parameters), *(_shown(key, row) for key in measured)]
        for record in kept
        for row in record["outcome"]
    ]
    open_ends = [record for record in kept if record["status"] != "finished"]
    finished = f"{len(kept) - len(open_ends)} runs finished"
    missing = "".join(
        f"- {markdown.escape(', '.join(f'{k}={v}' for k, v in record['parameters'].items()))}: {record['status']}\n"
        f"  {markdown.code(record['command'])}\n"
        for record in open_ends
    )
    return (
        f"# Sweep {name}\n\n{finished}; {len(open_ends)} not.\n\n"
        f"{markdown.table([*parameters, *(MEASURED[key] for key in measured)], lines)}\n\n"
        "Validation questions, ± standard error over them; each run at the θ that it selected on calibration "
        "questions, unless the sweep sets θ. Layers executed are measured, FLOPs counted. `sweep.csv` holds the "
        "command that reproduces each run alone.\n"
        + ("\n![Parameters and what was measured, a line a run](sweep.png)\n" if drawn else "")
        + (f"\nNot finished:\n\n{missing}" if missing else "")
    )


def _shown(key: str, row: dict[str, Any]) -> str:
    value = row[key]
    if key == "theta":
        return theta_text(value)
    if value is None:
        return "–"
    if key == "average":
        return f"{100 * value:.2f} ± {100 * (row['average_stderr'] or 0):.2f}"
    if key == "average_nll":
        return f"{value:.3f} ± {row['average_nll_stderr']:.3f}"
    if key == "weight_bytes":
        return f"{value / 1e6:,.1f}"
    if key == "seconds":
        return f"{value:,.1f}"
    return f"{value:.3f}" if isinstance(value, float) and key != "bits" else str(value)


def _sortable(value: str) -> tuple[int, float, str]:
    try:
        return 0, float(value), ""
    except ValueError:
        return 1, 0.0, value
