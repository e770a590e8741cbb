"""A run of the tiny model for the stages to work on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from qtale_lightning import stages
from qtale_lightning.cli import QTALECLI
from qtale_lightning.results.metadata import run_metadata
from qtale_lightning.results.origin import origin
from qtale_lightning.results.store import update_results
from qtale_lightning.routing.router import Router
from qtale_lightning.run import RunDirectory


@pytest.fixture(scope="session")
def make_run(options: Callable[..., list[str]]) -> Callable[..., RunDirectory]:
    """A run as ``fit`` leaves it, without training: its model with routers that decide by the token."""

    def make(root: Path, method: str, *more: str, dtype: torch.dtype = torch.float32) -> RunDirectory:
        cli = QTALECLI(options("tiny", method, *more, "--out", str(root)), "test")
        run, module = cli.run, cli.model.fresh()
        text = cli.config_text()
        made_from = origin(yaml.safe_load(text)) | {"rows": cli.prepare_data().digests()}
        run.claim(text, made_from)
        made = run_metadata("tiny", method, "facts", 0, "fit", "here") | {"made_from": made_from}
        update_results(run.root, "run", made)
        module.configure_model()
        torch.manual_seed(0)
        for part in module.model.modules():
            if isinstance(part, Router):
                nn.init.normal_(part.out.weight, 0.0, 0.5)
                nn.init.zeros_(part.out.bias)
        stages.export(run, cli.model.fresh(), module.state_dict(), dtype)
        if method == "qtale":
            stages.quantize(run, cli.prepare_data(), cli.quantization)
        return run

    return make
