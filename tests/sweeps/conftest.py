"""Sweeps small enough to look through."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtale_lightning.sweeps.definition import SweepDefinition, read_sweep

Define = Callable[..., SweepDefinition]

COMMAND = [
    "${env}",
    "${interpreter}",
    "-m",
    "${program}",
    "trial",
    "--to=${envvar:OUT}/x",
    "fit",
    "--",
    "${args}",
]


@pytest.fixture
def sweep_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a sweep file: ``sweep_file(key=value, …)`` over a good one; None leaves a key out."""

    def write(**keys: Any) -> Path:
        content = {
            "name": "x",
            "program": "qtale_lightning",
            "method": "grid",
            "metric": {"name": "average_nll", "goal": "minimize"},
            "parameters": {"model.lr": {"values": [0.1, 0.2]}},
            "command": COMMAND,
        } | keys
        file = tmp_path / "x.yaml"
        file.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return file

    return write


@pytest.fixture
def define(sweep_file: Callable[..., Path]) -> Define:
    """Such a sweep, read."""
    return lambda **keys: read_sweep(sweep_file(**keys))
