"""W&B is best effort: a server that fails costs nothing but its page."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger

from qtale_lightning.tracking import wandb_logger


@pytest.fixture(autouse=True)
def _finished() -> Iterator[None]:
    """No W&B run of one test goes on in the next."""
    yield
    wandb.finish()


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
