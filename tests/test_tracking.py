"""W&B is best effort: a server that fails costs nothing but its page. What it records can be read back."""

import csv
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.lib.config_util import save_config_file_from_dict

from qtale_lightning.__main__ import main
from qtale_lightning.report.results import load_results
from qtale_lightning.tracking import wandb_logger

# W&B has no reader of its own for Python: frames are read by their format, what is in them by its messages.
HEADER = b":W&B\xe1\xbe\x00"
BLOCK = 2**15
"""A LevelDB log: frames of (checksum, length, kind) and data, none across the end of a block."""
FULL, LAST = 1, 4


@dataclass
class Offline:
    """A run's record: configuration and summary as they ended, a dictionary for every step, files that were added."""

    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    run_id: str = ""

    def table(self, name: str, folder: Path) -> dict[str, Any]:
        """The content of a logged table, whose file lies in the run's folder."""
        (step,) = (step for step in self.history if f"{name}/path" in step)
        assert step[f"{name}/_type"] == "table-file"
        assert step[f"{name}/path"] in self.files
        return json.loads((folder / "files" / step[f"{name}/path"]).read_text(encoding="utf-8"))


def read_offline(folder: Path) -> Offline:
    """The record in an ``offline-run-…`` folder."""
    (file,) = folder.glob("*.wandb")
    found = Offline()
    for record in _records(file.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run_id = record.run.run_id
            found.config |= _values(record.run.config.update)
        elif kind == "config":
            found.config |= _values(record.config.update)
        elif kind == "summary":
            found.summary |= _values(record.summary.update)
        elif kind == "history":
            found.history.append(_values(record.history.item))
        elif kind == "files":
            found.files += [file.path for file in record.files.files]
    return found


def _records(data: bytes) -> Iterator[Record]:
    assert data[: len(HEADER)] == HEADER
    at, part = len(HEADER), b""
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (FULL, LAST):
            yield Record.FromString(part)
            part = b""


def _values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.fixture(autouse=True)
def _finished() -> Iterator[None]:
    """No W&B run of one test goes on in the next."""
    yield
    wandb.finish()


def written() -> None:
    """Ends the run and W&B's own process: only then all of a record is in its file."""
    wandb.finish()
    wandb.teardown()


def failing(monkeypatch: pytest.MonkeyPatch, *modes: bool) -> None:
    """Let starting a run fail where its ``offline`` is one of these."""
    start = WandbLogger.experiment.fget  # type: ignore[attr-defined]

    def experiment(logger: Any) -> Any:
        if logger._offline in modes:
            raise wandb.errors.CommError("no such host")
        return start(logger)

    monkeypatch.setattr(WandbLogger, "experiment", property(experiment))


def test_disabled_is_no_logger(tmp_path: Path) -> None:
    assert wandb_logger(tmp_path, "disabled", "qtale") is None
    assert not (tmp_path / "wandb").exists()


def test_auto_is_offline_where_nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    logger = wandb_logger(tmp_path, "auto", "qtale")
    assert logger is not None
    assert logger._offline
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_a_server_that_fails_leaves_an_offline_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, False)
    logger = wandb_logger(tmp_path, "online", "qtale")
    assert logger is not None
    assert logger._offline


def test_training_goes_on_where_nothing_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, False, True)
    assert wandb_logger(tmp_path, "online", "qtale") is None


def test_a_run_keeps_its_identity(tmp_path: Path) -> None:
    first = wandb_logger(tmp_path, "offline", "qtale")
    wandb.finish()
    again = wandb_logger(tmp_path, "offline", "qtale")
    assert first is not None
    assert again is not None
    assert first._id == again._id


def test_an_offline_record_holds_configuration_metrics_and_tables(
    options: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Read back from the .wandb file after a tiny run, and held to the run's own files."""
    more = (
        *("--data.limit_train", "32", "--data.limit_validation", "4", "--data.calibration_rows", "4"),
        *(
            "--data.batch_size",
            "4",
            "--trainer.max_steps",
            "5",
            "--validations",
            "1",
            "--quantize.bits",
            "[4]",
        ),
        *("--quantize.sequences", "16", "--sweep.thresholds", "[0.5,0.3]", "--wandb", "offline"),
    )
    main(["fit", *options("tiny", "qtale", *more, "--model.lambda_entropy=0.25", "--out", str(tmp_path))])
    written()
    run = tmp_path / "tiny-qtale-facts-s0"
    (folder,) = (run / "wandb").glob("offline-run-*")
    record, results = read_offline(folder), load_results(run)

    assert record.config["model"]["lambda_entropy"] == 0.25
    assert record.config["quantize"]["bits"] == [4]
    assert record.config["effective_batch"] == 4

    steps = [step for step in record.history if "train/loss" in step]
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        local = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [step["train/loss"] for step in steps] == pytest.approx(
        [float(row["train/loss"]) for row in local]
    )
    assert {"train/entropy_loss", "train/flip_ratio", "trainer/global_step"} <= steps[0].keys()
    assert any("val/execution_ratio" in step for step in record.history)

    table = record.table("evaluation", folder)
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    scored = [row for row in results["evaluation"] if row["split"] == "validation"]
    assert [(row["bits"], row["theta"]) for row in rows] == [(row["bits"], row["theta"]) for row in scored]
    assert [row["nll"] for row in rows] == pytest.approx([row["average_nll"] for row in scored])

    for chosen in results["selected"]:
        prefix = f"selected/{chosen['bits']}bit"
        assert record.summary[f"{prefix}/average_nll"] == pytest.approx(chosen["average_nll"])
        assert record.summary[f"{prefix}/theta"] == chosen["theta"]


def test_under_an_agent_the_sweeps_run_is_the_one_that_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's agent gives id and parameters by the environment; the run's own id gives way."""
    parameters = tmp_path / "parameters.yaml"
    save_config_file_from_dict(str(parameters), {"model.lambda_entropy": {"value": 0.1}})
    for name, value in {"SWEEP_ID": "sweep1", "RUN_ID": "run1", "SWEEP_PARAM_PATH": str(parameters)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()  # it has read the environment already
    logger = wandb_logger(tmp_path, "offline", "qtale")
    assert logger is not None
    logger.log_hyperparams({"model": {"lambda_entropy": 0.1}})
    logger.log_metrics({"train/loss": 1.0})
    written()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    record = read_offline(folder)
    assert record.run_id == "run1"
    assert record.config["model.lambda_entropy"] == 0.1
    assert record.config["model"] == {"lambda_entropy": 0.1}
