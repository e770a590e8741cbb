"""What trains, made from a configuration as LightningCLI parses it: module, data, trainer, callbacks."""

import logging
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from transformers.utils.logging import disable_progress_bar

from qtale_lightning.checkpoints import RunCheckpointIO
from qtale_lightning.configuration import DESCRIPTION, RunConfiguration, add_run_options, check_files
from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.hub.repository import COMMIT
from qtale_lightning.models.sources import check_source, check_tokens, source_name
from qtale_lightning.module import QTALEModule
from qtale_lightning.precision import Origin, training_precision
from qtale_lightning.run import RunDirectory
from qtale_lightning.strategy import resolve_strategy

log = logging.getLogger(__name__)

# The best checkpoint is chosen by this logged value: the objective at
# inference decisions and the final target ratio, so that a schedule's early, expensive models don't win.
BEST = "val/loss"

# How often training saves what it would resume from: an interruption costs a twentieth of it at most.
SAVES = 20


class QTALECLI(RunConfiguration, LightningCLI):
    """Parses a run's configuration and makes its module and data; the trainer is made for ``fit`` only.

    Attributes:
        precision_origin: Where ``--trainer.precision`` is from, which is left to the run, or else to the device, where
            nothing is said.
    """

    model: QTALEModule
    datamodule: CommonsenseDataModule
    precision_origin: Origin

    def __init__(self, args: list[str], prog: str) -> None:
        check_files(args)
        disable_progress_bar()  # transformers', one for every load and save
        super().__init__(
            QTALEModule,
            CommonsenseDataModule,
            run=False,
            args=args,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=None,  # the run directory keeps the configuration, and checks it
            parser_kwargs={"prog": prog, "description": DESCRIPTION, "exit_on_error": False},
        )
        trainer, kept = self.config["trainer"], self.run.precision()
        self.precision_origin = "given" if trainer["precision"] is not None else "kept" if kept else "chosen"
        if trainer["precision"] is None:
            trainer["precision"] = kept or training_precision(trainer["accelerator"])

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The suite's own options."""
        add_run_options(parser)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Nothing yet: the stage commands need no trainer."""
        return None

    def config_text(self) -> str:
        """The resolved configuration as YAML, without what belongs to this start only."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False, skip_link_targets=True))
        for key in ("config", "ckpt_path"):
            config.pop(key, None)
        return yaml.safe_dump(config, sort_keys=False)

    def prepare_data(self) -> CommonsenseDataModule:
        """The data module, read and tokenized."""
        self.datamodule.tokenizer = self.model.tokenizer
        self.datamodule.setup("fit")
        return self.datamodule

    def pin_base(self) -> None:
        """Settle the base model's commit for the whole run, and record it in the configuration.

        A run that was begun keeps its own: a branch or tag may have moved meanwhile.

        Raises:
            HubError: It can't be looked up; the message says what to do.
        """
        model, begun = self.model, self.run.config
        if model.path is not None and not COMMIT.fullmatch(model.revision or "") and begun.is_file():
            there = self.run.read_config()["model"]
            if there.get("path") == model.path and there.get("revision"):
                model.revision = there["revision"]
                log.info("the base model is %s at %s, with which the run began", model.path, model.revision)
        self.config["model"]["revision"] = model.commit()

    def check_base(self) -> None:
        """Refuse a base model that can't be trained, by its configuration and tokenizer (ValueError, OSError)."""
        name, path, revision = self.model.name, self.model.path, self.model.revision
        config = check_source(name, path, revision)
        check_tokens(self.model.tokenizer, config, source_name(name, path, revision))

    def make_trainer(self) -> L.Trainer:
        """The trainer of ``fit``, with the run's loggers and callbacks.

        Validation is spread evenly over training, whether that is given in steps or in epochs.
        """
        run, options = self.run, dict(self.config["trainer"])
        accumulate = options["accumulate_grad_batches"]
        batches = self.datamodule.steps_per_epoch * (options["max_epochs"] or 1)
        if (options["max_steps"] or -1) > 0:
            batches = options["max_steps"] * accumulate
        options |= {
            "default_root_dir": str(run.root),
            "use_distributed_sampler": False,  # batches by length are cut for every rank by the data module
            "val_check_interval": max(1, batches // self.config["validations"]),
            "check_val_every_n_epoch": None,
            "logger": self._loggers(run),
            "callbacks": [*(options["callbacks"] or []), *self._callbacks(run, batches // accumulate)],
            "strategy": resolve_strategy(options["strategy"]),
            "plugins": [RunCheckpointIO(run.root), *(options["plugins"] or [])],
        }
        return L.Trainer(**options)

    def _callbacks(self, run: RunDirectory, steps: int) -> list[Callback]:
        # Here, so that `fit --help` doesn't wait for what runs after training.
        from qtale_lightning.callbacks import (
            AWQQuantization,
            Checkpoints,
            Export,
            FiniteNumbers,
            Report,
            RoutingMonitor,
            ThresholdSweep,
            TrainingTotals,
        )

        monitors = [
            FiniteNumbers(),
            TrainingTotals(run),
            RoutingMonitor(run),
            LearningRateMonitor("step"),
        ]
        if self.config["trainer"]["enable_progress_bar"] is not False:
            monitors.append(TQDMProgressBar(10))
        after = [
            Export(run),
            AWQQuantization(run, self.quantization),
            ThresholdSweep(run, self.sweep, self.quantization),
            Report(run),
        ]
        return [*monitors, Checkpoints(run, max(1, steps // SAVES), BEST), *after]

    def _loggers(self, run: RunDirectory) -> list[Logger]:
        from qtale_lightning.tracking import wandb_logger

        # A folder for every start: CSVLogger deletes what it finds in its own.
        local = CSVLogger(run.root, name="logs", version=run.next_log(), flush_logs_every_n_steps=20)
        remote = wandb_logger(run.root, self.config["wandb"], self.config["wandb_project"])
        loggers: list[Logger] = [local] if remote is None else [local, remote]
        settings = yaml.safe_load(self.config_text())
        settings["effective_batch"] = self._effective_batch()
        for logger in loggers:
            logger.log_hyperparams(settings)
        return loggers

    def _effective_batch(self) -> int:
        accumulate = self.config["trainer"]["accumulate_grad_batches"]
        return self.datamodule.batch_size * accumulate * self.devices
