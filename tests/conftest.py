"""One thread, no network, and the command lines that the tests start runs with."""

import os

# Before anything imports the hub's client or W&B: both read their environment once.
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

Options = Callable[..., list[str]]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    config.addinivalue_line("filterwarnings", "ignore:LightningCLI's args parameter")  # argv is pytest's here


@pytest.fixture(scope="session")
def options() -> Options:
    """The options that choose a run: ``options(model, method, *more)``, on the built-in questions."""

    def choose(model: str = "tiny", method: str = "qtale", *more: str) -> list[str]:
        files = (
            EXPERIMENTS / "base.yaml",
            EXPERIMENTS / f"models/{model}.yaml",
            EXPERIMENTS / f"methods/{method}.yaml",
        )
        configs = [part for file in files for part in ("--config", str(file))]
        return [*configs, "--data.tasks", "facts", *more]

    return choose
