"""The paper's numbers beside ours, only where the setting is the paper's: `experiments/paper/<model>.yaml`."""

from pathlib import Path
from typing import Any

from qtale_lightning.configuration import PlannedRun, RunConfiguration
from qtale_lightning.experiments import find
from qtale_lightning.run import FREE_TRAINER_KEYS
from qtale_lightning.tables.declaration import Line, PaperValue
from qtale_lightning.tables.table import Table

FOLDER = Path("experiments/paper")

# What may be another than the paper's: where things lie and run, and what a line itself says.
_FREE = {
    "trainer": {*FREE_TRAINER_KEYS, "accumulate_grad_batches"},
    "model": {"path", "revision", "seed"},
    "data": {"root", "num_workers", "seed", "batch_size", "tasks"},
    "quantize": {"bits", "engine"},
    "sweep": {"rule", "margin", "budgets"},
}


def shown(table: Table, line: Line) -> dict[str, float]:
    """The paper's values of a line, by column."""
    given = _given(table, line)
    return {value.column: value.value for value in given} if given and not _apart(table, line) else {}


def differences(table: Table) -> list[str]:
    """In which options the table isn't in the paper's setting, where it would have values of the paper's."""
    found = (option for line in table.lines if _given(table, line) for option in _apart(table, line))
    return list(dict.fromkeys(found))


def _given(table: Table, line: Line) -> list[PaperValue]:
    key = (table.request.model, line.name, line.bits)
    return [value for value in table.declaration.paper if (value.model, value.cell, value.bits) == key]


def _apart(table: Table, line: Line) -> list[str]:
    """The options of a line's run that the paper's setting has otherwise."""
    data, seed = table.data_of(line)[0], table.request.seeds[0]
    ours = PlannedRun(list(table.run_of(line, data, seed).arguments), "fit")
    files = (FOLDER / f"{table.request.model}.yaml", Path(f"experiments/methods/{line.method}.yaml"))
    papers = PlannedRun([part for file in files for part in ("--config", str(find(file)))], "fit")
    engine = "none" if line.bits == 16 else papers.quantization.engine
    one = _setting(ours) | {"engine": line.engine}
    other = _setting(papers) | {"engine": engine}
    return [option for option in one if one[option] != other[option]]


def _setting(run: RunConfiguration) -> dict[str, Any]:
    """What results depend on besides the line and the seed, by option."""
    config = run.config.as_dict()
    setting = {
        f"{section}.{key}": value
        for section, free in _FREE.items()
        for key, value in config[section].items()
        if key not in free
    }
    accumulated = config["trainer"]["accumulate_grad_batches"] or 1
    batch = run.datamodule.batch_size * accumulated * run.devices
    return setting | {"data.tasks": run.datamodule.tasks, "effective batch": batch}
