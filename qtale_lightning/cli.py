"""What trains, made from a configuration as LightningCLI parses it: module, data, trainer, callbacks."""

import logging
from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    ProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.plugins import CheckpointIO, Precision
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers.utils.logging import disable_progress_bar

from qtale_lightning import checks, cpu
from qtale_lightning.checkpoints import RunCheckpointIO
from qtale_lightning.commands.mistakes import plain
from qtale_lightning.configuration import RunConfiguration
from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.hub.repository import COMMIT
from qtale_lightning.models.sources import check_source, check_tokens, source_name
from qtale_lightning.module import QTALEModule
from qtale_lightning.options import add_run_options, with_files
from qtale_lightning.precision import Origin, training_precision
from qtale_lightning.quantization.options import MIN_TOKENS
from qtale_lightning.routing import Rows
from qtale_lightning.run import RunDirectory
from qtale_lightning.schedule import Schedule
from qtale_lightning.strategy import resolve_strategy
from qtale_lightning.values import plain_numbers
from qtale_lightning.yaml_files import plain_yaml

log = logging.getLogger(__name__)

# The best checkpoint is chosen by this logged value: the objective at
# inference decisions and the final target ratio, so that a schedule's early, expensive models don't win.
BEST = "val/loss"

# Training rows that a method measures on, at most, of all tasks in turn: rankings of layers don't move with more.
MEASURED_ROWS = 64

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

    def __init__(self, args: Sequence[str], prog: str) -> None:
        args = with_files(args)
        disable_progress_bar()  # transformers', one for every load and save
        super().__init__(
            QTALEModule,
            CommonsenseDataModule,
            run=False,
            args=args,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=None,  # the run directory keeps the configuration, and checks it
            parser_kwargs={"prog": prog, "exit_on_error": False},
        )
        self._settle_precision()

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Its numbers go into checkpoints."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:  # of what Lightning alone understands; all else was checked before
            raise ArgumentError(None, plain(str(error))) from None
        plain_numbers(self.config)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The suite's own options."""
        add_run_options(parser)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Nothing yet: the stage commands need no trainer."""
        return None

    def config_text(self) -> str:
        """The resolved configuration as YAML, without what belongs to this start only."""
        config = plain_yaml(self.parser.dump(self.config, skip_none=False, skip_link_targets=True))
        for key in ("config", "ckpt_path"):
            config.pop(key, None)
        return yaml.safe_dump(config, sort_keys=False)

    def _settle_precision(self) -> None:
        trainer = self.config["trainer"]
        kept = self._begun("trainer").get("precision")
        self.precision_origin = "given" if trainer["precision"] is not None else "kept" if kept else "chosen"
        if trainer["precision"] is None:
            trainer["precision"] = kept or training_precision(trainer["accelerator"])

    def _begun(self, section: str) -> dict[str, Any]:
        """A section of the configuration that the run began with; empty where it hasn't.

        Raises:
            DamagedFileError: The run's configuration isn't what it wrote.
        """
        section_there: dict[str, Any] = self.run.read_config()[section] if self.run.config.is_file() else {}
        return section_there

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
        model, there = self.model, self._begun("model")
        moving = model.path is not None and not COMMIT.fullmatch(model.revision or "")
        if moving and there.get("path") == model.path and there.get("revision"):
            model.revision = there["revision"]
            log.info("the base model is %s at %s, with which the run began", model.path, model.revision)
        self.config["model"]["revision"] = model.commit()

    def check_base(self) -> None:
        """Refuse a base model that can't be trained, by its configuration and tokenizer (ValueError, OSError)."""
        name, path, revision = self.model.name, self.model.path, self.model.revision
        config = check_source(name, path, revision)
        check_tokens(self.model.tokenizer, config, source_name(name, path, revision))

    def check_training(self) -> None:
        """Refuse what can't be trained, or not as the options of the trainer ask (ValueError)."""
        super().check_training()
        cpu.instruction_set()  # a wrong choice of it, too
        for option, kind, instead in (
            ("logger", WandbLogger, "leave it out, and give --wandb online, --wandb_project NAME"),
            ("plugins", CheckpointIO, "leave it out: checkpoints hold trainable weights only, and are small"),
            (
                "strategy",
                FSDPStrategy,
                "give --trainer.strategy fsdp, which can mix frozen and trained dtypes",
            ),
        ):
            for one in self._asked(option):
                if isinstance(one, kind):
                    raise ValueError(
                        f"--trainer.{option} {type(one).__name__} doesn't fit what the suite does itself: {instead}"
                    )
        limit = self.config["trainer"]["max_time"]
        try:
            if limit is not None and not (Timer(limit).time_remaining() or 0) > 0:
                raise ValueError(f"--trainer.max_time {limit} leaves no time to train")
        except MisconfigurationException as error:
            raise ValueError(f"--trainer.max_time {limit}: {error}") from error

    def check_rows(self) -> None:
        """Refuse rows that are too few to train or quantize on; :meth:`prepare_data` comes before (ValueError)."""
        _ = self.schedule  # refuses rows that are fewer than a batch
        validated = -(-len(self.datamodule.questions("calibration")) // self.datamodule.batch_size)
        checks.limited(self.config["trainer"], "limit_val_batches", validated)
        self.check_calibration()
        if self.sweep.searches and self.model.how.theta:
            from qtale_lightning.evaluation.budget import TOLERANCE

            start = self.model.routing_options["start_layer"] / self.model.shape.num_hidden_layers
            least = start + (1 - start) * self._reserved_share()
            self.sweep.check_budgets(least - TOLERANCE, "layers without a router and reserved tokens")

    def prepare_method(self) -> None:
        """Give the module what is measured on before training; :meth:`prepare_data` comes before."""
        if self.model.how.measures or self.model.routing_options["stand_in_rank"]:
            sequences = self.datamodule.calibration_sequences(MEASURED_ROWS)
            self.model.rows = Rows(sequences, self._reserved_share())

    def _reserved_share(self) -> float:
        """Of the tokens that scoring calibration questions computes: those that execute every layer."""
        from qtale_lightning.evaluation.branches import computed_tokens

        questions = self.datamodule.questions("calibration")
        tokens, first = computed_tokens(questions, self.model.routing_options["reserved_tokens"])
        return first / tokens

    def check_calibration(self) -> None:
        """Refuse rows that are too few to quantize on; :meth:`prepare_data` comes before (ValueError)."""
        quantization = self.quantization
        if quantization.bits and quantization.calibrates:
            sequences = self.datamodule.calibration_sequences(quantization.sequences)
            checks.check_calibration(sequences, self.reserved_tokens, MIN_TOKENS)

    @property
    def schedule(self) -> Schedule:
        """How long training is; :meth:`prepare_data` comes before."""
        return checks.schedule(self.config["trainer"], self.datamodule.batches(self.devices))

    def _asked(self, option: str) -> list[Any]:
        """What ``--trainer.<option>`` asks for, where it takes one or several: as instances."""
        asked = self.config_init["trainer"][option]
        if asked is None or isinstance(asked, bool):
            return []
        return [*asked] if isinstance(asked, list | tuple) else [asked]

    def make_trainer(self) -> L.Trainer:
        """The trainer of ``fit``, with the run's callbacks; its loggers, which write, come by :meth:`start_logging`.

        Validation is spread evenly over training, whether that is given in steps or in epochs.

        Raises:
            ValueError: The Trainer refuses its options.
        """
        run, schedule = self.run, self.schedule
        options = dict(self.config_init["trainer"])  # its classes are instances there
        plugins = self._asked("plugins")
        if options["precision"] is None and not any(isinstance(one, Precision) for one in plugins):
            options["precision"] = self.config["trainer"]["precision"]
        asked, ours = self._asked("callbacks"), self._callbacks(run, schedule.steps)
        if any(isinstance(callback, ProgressBar) for callback in asked):
            ours = [callback for callback in ours if not isinstance(callback, ProgressBar)]
        options |= {
            "default_root_dir": str(run.root),
            "use_distributed_sampler": False,  # batches by length are cut for every rank by the data module
            "val_check_interval": schedule.interval(self.config["validations"]),
            "check_val_every_n_epoch": None,
            "logger": False,
            "callbacks": [*asked, *ours],
            "strategy": resolve_strategy(self.config_init["trainer"]["strategy"]),
            "plugins": [RunCheckpointIO(run.root), *plugins],
        }
        try:
            return L.Trainer(**options)
        except (MisconfigurationException, RuntimeError, TypeError, ModuleNotFoundError) as error:
            raise ValueError(f"Lightning's Trainer refuses its options (--trainer.…): {error}") from error

    def start_logging(self, trainer: L.Trainer) -> None:
        """Give the trainer the run's loggers, and those of ``--trainer.logger`` behind them."""
        if self.config["trainer"]["logger"] is False:
            log.info("--trainer.logger false: the run's own log stays, since its report is made from it")
        trainer.loggers = [*self._loggers(self.run), *self._asked("logger")]

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
        settings = plain_yaml(self.config_text())
        settings["effective_batch"] = self._effective_batch()
        for logger in loggers:
            logger.log_hyperparams(settings)
        return loggers

    def _effective_batch(self) -> int:
        accumulate = self.config["trainer"]["accumulate_grad_batches"]
        return self.datamodule.batch_size * accumulate * self.devices
