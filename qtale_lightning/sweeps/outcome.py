"""What a trial measured: rows of its run's results."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from qtale_lightning.results.schema import Evaluation
from qtale_lightning.results.series import selected_row, validation_series
from qtale_lightning.results.store import load_results, same_theta
from qtale_lightning.routing.perturbation import Perturbation
from qtale_lightning.yaml_files import plain_yaml

KEYS = (
    *("bits", "engine", "theta", "execution_ratio", "flops_ratio", "average", "average_stderr"),
    *("average_nll", "average_nll_stderr", "weight_bytes", "seconds"),
)


def outcome(run: Path, command: Sequence[str]) -> list[dict[str, Any]]:
    """The validation rows that a command is about: at the precision, engine and θ that it names; else the selected.

    Args:
        command: The trial's last, as `python -m qtale_lightning` takes it.

    Raises:
        FileNotFoundError, ValueError: as `load_results`.
    """
    results = load_results(run)
    bits, theta = _option(command, "bits"), _option(command, "theta")
    if bits is None and command[0] != "fit":
        bits = _option(command, "quantize.bits")
    if command[0] == "evaluate" and bits is None:
        bits = 16
    engine = _option(command, "quantize.engine") if command[0] != "fit" else None
    given = {option.name: _option(command, option.name) for option in fields(Perturbation)}
    perturbation = Perturbation(**{name: value for name, value in given.items() if value is not None})
    chosen = []
    for series in validation_series(results, perturbation.record).values():
        if bits is not None and series[0]["bits"] not in (bits if isinstance(bits, list) else [bits]):
            continue
        if engine is not None and series[0]["engine"] not in (engine, "none"):
            continue
        row = (
            selected_row(results, series)
            if theta is None
            else next((row for row in series if same_theta(row["theta"], theta)), None)
        )
        if row is not None:
            chosen.append(_kept(row))
    return chosen


def _kept(row: Evaluation) -> dict[str, Any]:
    return {key: row[key] for key in KEYS}  # type: ignore[literal-required]


def _option(command: Sequence[str], name: str) -> Any:
    """The last value of an option in a command line, as YAML reads it; None without one."""
    value = None
    for argument, following in zip(command, [*command[1:], ""], strict=True):
        if argument == f"--{name}":
            value = following
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
    return None if value is None else plain_yaml(value)
