"""W&B is best effort: what it records can be read back, and where it can't be used nothing else suffers."""

import csv
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb
from wandb.sdk.lib.config_util import save_config_file_from_dict

from qtale_lightning import wandb_session
from qtale_lightning.__main__ import main
from qtale_lightning.callbacks import Report
from qtale_lightning.results.store import load_results
from qtale_lightning.run import RunDirectory
from qtale_lightning.tracking import wandb_logger
from tests.offline_record import read_offline

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _finished() -> Iterator[None]:
    """No W&B run of one test goes on in the next, and each reads its own environment."""
    wandb.teardown()
    yield
    wandb.teardown()


def failing(monkeypatch: pytest.MonkeyPatch, *modes: str) -> None:
    """Let starting a run fail in these modes."""
    start = wandb.init

    def init(settings: wandb.Settings, **options: Any) -> Any:
        if settings.mode in modes:
            raise wandb.errors.CommError("no such host")
        return start(settings=settings, **options)

    monkeypatch.setattr(wandb, "init", init)


def recorded(root: Path) -> list[str]:
    """Names of the records in a run's folder, without time and id."""
    return [folder.name.split("-run-")[0] for folder in root.glob("wandb/*run-*") if folder.is_dir()]


def test_disabled_is_no_logger(tmp_path: Path) -> None:
    assert wandb_logger(tmp_path, "disabled", "qtale") is None


def test_disabled_needs_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert wandb_logger(tmp_path, "disabled", "qtale") is None
    assert not (tmp_path / "wandb").exists()


def test_auto_is_disabled_where_wandb_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_logger(tmp_path, "auto", "qtale") is None


DEFAULT = """
import sys
from pathlib import Path
sys.orig_argv, sys.argv = ["-m", "qtale_lightning"], ["-m", *sys.argv[1:]]  # a command imports only what it needs
from qtale_lightning.tracking import wandb_logger
tracker = wandb_logger(Path(sys.argv[1]), "auto", "qtale")
tracker.log_hyperparams({"model": {"lr": 0.1}})
tracker.log_metrics({"train/loss": 1.5}, 3)
"""


@pytest.mark.slow
def test_a_home_without_anything_gives_an_offline_record(tmp_path: Path) -> None:
    """The default of a newcomer, whose process ends W&B's run by ending itself."""
    home, run = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DEFAULT, str(run)]
    subprocess.run(command, env=environment, cwd=home, check=True, timeout=240)
    (folder,) = run.glob("wandb/offline-run-*")
    record = read_offline(folder)
    assert record.config["model"] == {"lr": 0.1}
    assert [(row["train/loss"], row["trainer/global_step"]) for row in record.history] == [(1.5, 3)]
    assert not (home / "wandb").exists()


@pytest.mark.parametrize("mode", ["auto", "online"])
def test_a_malformed_key_leaves_an_offline_record(
    mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    tracker = wandb_logger(tmp_path, mode, "qtale")
    assert tracker is not None
    tracker.finalize("success")
    assert "API key must have 40+ characters" in caplog.text
    assert recorded(tmp_path) == ["offline"]


def test_a_server_that_fails_leaves_an_offline_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "online")
    tracker = wandb_logger(tmp_path, "online", "qtale")
    assert tracker is not None
    tracker.finalize("success")
    assert recorded(tmp_path) == ["offline"]


def test_training_goes_on_where_nothing_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "online", "offline")
    assert wandb_logger(tmp_path, "online", "qtale") is None


@pytest.mark.slow
def test_a_run_keeps_its_identity(tmp_path: Path) -> None:
    versions = []
    for _ in range(2):
        tracker = wandb_logger(tmp_path, "offline", "qtale")
        assert tracker is not None
        tracker.finalize("success")
        versions.append(tracker.version)
    assert versions[0] == versions[1]


def test_only_the_first_rank_has_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero.rank_zero_only.rank", 1)
    assert wandb_logger(tmp_path, "offline", "qtale") is None
    assert not (tmp_path / "wandb").exists()


def test_what_a_sweep_optimises_is_there_where_a_table_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(**kwargs: Any) -> None:
        raise wandb.errors.CommError("no tables today")

    monkeypatch.setattr(wandb, "Table", fails)
    monkeypatch.setattr("qtale_lightning.callbacks.report.evaluation_frame", lambda _: pd.DataFrame())
    tracker = wandb_logger(tmp_path, "offline", "qtale")
    assert tracker is not None
    chosen = {"bits": 3, "average": 0.5, "average_nll": 0.25, "execution_ratio": 0.7, "theta": 0.5}
    results: Any = {"selected": [chosen]}
    Report(RunDirectory(tmp_path))._publish(tracker, results)
    tracker.finalize("success")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    summary = read_offline(folder).summary
    assert {name: summary[f"selected/3bit/{name}"] for name in chosen if name != "bits"} == {
        name: value for name, value in chosen.items() if name != "bits"
    }
    assert caplog.text.count("no tables today") == 1


def test_a_backlog_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wandb_session, "BACKLOG", 0)
    tracker = wandb_logger(tmp_path, "offline", "qtale")
    assert tracker is not None
    for step in range(3):
        tracker.log_metrics({"train/loss": 1.0}, step)
    tracker.finalize("success")
    assert caplog.text.count("later ones are dropped") == 1


def test_the_way_to_upload_an_offline_record_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tracker = wandb_logger(tmp_path / "a run", "offline", "qtale")
    assert tracker is not None
    tracker.finalize("success")
    (folder,) = tmp_path.glob("a run/wandb/offline-run-*")
    assert f"wandb sync '{folder}'" in caplog.text


@pytest.mark.slow
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
    tracker = wandb_logger(tmp_path, "offline", "qtale")
    assert tracker is not None
    tracker.log_hyperparams({"model": {"lambda_entropy": 0.1}})
    tracker.log_metrics({"train/loss": 1.0})
    tracker.finalize("success")
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    record = read_offline(folder)
    assert record.run_id == "run1"
    assert record.config["model.lambda_entropy"] == 0.1
    assert record.config["model"] == {"lambda_entropy": 0.1}
