"""Weights & Biases as a logger of Lightning's: training never waits for it and never stops because of it."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from qtale_lightning.settings import WandbMode
from qtale_lightning.wandb_session import Session

STEP = "trainer/global_step"
"""The x axis of all metrics, by the name that Lightning's own logger has made customary."""


class WandbTracker(Logger):
    """Passes on what is logged, soon; see `Session`. It ends with the trainer, or else with the process."""

    def __init__(self, session: Session, project: str) -> None:
        super().__init__()
        self._session, self._project = session, project
        session.do("the x axis", _define_axis)

    @property
    def name(self) -> str:
        """The project."""
        return self._project

    @property
    def version(self) -> str:
        """The run's id."""
        return self._session.run_id

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The configuration, as plain nested values."""
        values = dict(vars(params) if isinstance(params, Namespace) else params)
        self._session.do("the configuration", lambda run: run.config.update(values, allow_val_change=True))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Numbers of an optimizer step."""
        values = dict(metrics) | ({} if step is None else {STEP: step})
        self._session.do("metrics", lambda run: run.log(values))

    @rank_zero_only
    def log_histograms(self, histograms: Mapping[str, Mapping[str, Sequence[float]]], step: int) -> None:
        """Histograms of a step, by name: ``edges`` and the ``counts`` between them."""
        kept = dict(histograms)
        self._session.do("histograms", lambda run: run.log({**_histograms(kept), STEP: step}))

    @rank_zero_only
    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Numbers of the whole run."""
        kept = dict(values)
        self._session.do("the summary", lambda run: run.summary.update(kept))

    @rank_zero_only
    def log_table(self, name: str, frame: pd.DataFrame) -> None:
        """A table."""
        import wandb

        self._session.do("tables", lambda run: run.log({name: wandb.Table(dataframe=frame)}))

    @rank_zero_only
    def log_image(self, name: str, file: Path) -> None:
        """A picture."""
        import wandb

        self._session.do("pictures", lambda run: run.log({name: wandb.Image(str(file))}))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """The end, which Lightning calls however training ended."""
        self._session.finish(0 if status == "success" else 1)


def wandb_logger(root: Path, mode: WandbMode, project: str) -> WandbTracker | None:
    """A started logger that writes to ``<run>/wandb``; None where W&B is disabled or can't be started at all.

    None on other ranks than the first, too: they log nothing.
    """
    if getattr(rank_zero_only, "rank", 0):
        return None
    session = Session.start(root, mode, project)
    return None if session is None else WandbTracker(session, project)


def _histograms(shown: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    import wandb

    return {
        name: wandb.Histogram(np_histogram=(np.array(one["counts"]), np.array(one["edges"])))
        for name, one in shown.items()
    }


def _define_axis(run: Any) -> None:
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
