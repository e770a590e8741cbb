"""The configuration of a run, as LightningCLI parses it, and the objects made from it."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger

from qtale_lightning.callbacks import (
    AWQQuantization,
    Export,
    LastCheckpoint,
    Report,
    RoutingMonitor,
    ThresholdSweep,
    TrainingTotals,
)
from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.evaluation.cost import linear_shapes
from qtale_lightning.models.sources import check_source, check_tokens, planned_config, source_name
from qtale_lightning.module import QTALEModule
from qtale_lightning.quantization.calibration import MIN_TOKENS
from qtale_lightning.quantization.mappings import LINEARS
from qtale_lightning.run import RunDirectory
from qtale_lightning.strategy import resolve_strategy
from qtale_lightning.tracking import WandbMode, wandb_logger

log = logging.getLogger(__name__)

# The best checkpoint is chosen by this logged value: the objective at
# inference decisions and the final target ratio, so that a schedule's early, expensive models don't win.
BEST = "val/loss"

# How often training saves what it would resume from: an interruption costs a twentieth of it at most.
SAVES = 20


class QTALECLI(LightningCLI):
    """Parses a run's configuration and makes its module and data; the trainer is made for ``fit`` only."""

    model: QTALEModule
    datamodule: CommonsenseDataModule

    def __init__(self, args: list[str], prog: str) -> None:
        super().__init__(
            QTALEModule,
            CommonsenseDataModule,
            run=False,
            args=args,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=None,  # the run directory keeps the configuration, and checks it
            parser_kwargs={"prog": prog, "description": "Configuration of a QTALE run."},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The suite's own options, beside --model, --data and --trainer."""
        parser.add_argument(
            "--out", type=str, default="outputs", help="Folder that run directories are made in."
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Checkpoint to resume from; 'last' is the run's own. A run that was interrupted resumes by itself.",
        )
        parser.add_argument(
            "--validations",
            type=int,
            default=4,
            help="Validations (and checkpoints) during training, evenly spread.",
        )
        parser.add_argument(
            "--wandb",
            type=WandbMode,
            default="auto",
            help="W&B: online, offline (records in <run>/wandb), disabled; auto is online if you are logged in.",
        )
        parser.add_argument("--wandb_project", type=str, default="qtale", help="W&B project.")
        parser.add_lightning_class_args(AWQQuantization, "quantize")
        parser.add_lightning_class_args(ThresholdSweep, "sweep")
        for target in ("model.seed", "data.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=_seed)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Nothing yet: the stage commands need no trainer."""
        return None

    # ------------------------------------------------------------------------------------------------ objects

    @property
    def run(self) -> RunDirectory:
        """The run's directory, named by what it runs."""
        name = f"{self.model.name}-{self.model.method}-{self.datamodule.label}-s{self.model.seed}"
        return RunDirectory(Path(self.config["out"]) / name)

    @property
    def quantization(self) -> AWQQuantization:
        """The quantization callback."""
        return self.config_init["quantize"]

    @property
    def threshold_sweep(self) -> ThresholdSweep:
        """The sweep callback."""
        return self.config_init["sweep"]

    @property
    def devices(self) -> int:
        """Of all nodes, as far as the configuration says."""
        devices = str(self.config["trainer"]["devices"])  # the parser leaves numbers as text, too
        return (int(devices) if devices.isdecimal() else 1) * self.config["trainer"]["num_nodes"]

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

    def check_base(self) -> None:
        """Refuse a base model that can't be trained, by its configuration and tokenizer (ValueError, OSError)."""
        name, path = self.model.name, self.model.path
        config = check_source(name, path)
        check_tokens(self.model.tokenizer, config, source_name(name, path))

    def check(self) -> None:
        """Refuse what can't work before anything expensive starts (ValueError)."""
        config = planned_config(self.model.name, self.model.path)
        routed = self.model.method != "full"
        reserved = self.model.routing_options["reserved_tokens"] if routed else MIN_TOKENS
        shapes = linear_shapes(config)
        layers = [f"model.layers.{i}" for i in range(config.num_hidden_layers)]
        named = {f"{layer}.{name}": shapes[name.split(".")[1]] for layer in layers for name in LINEARS}
        self.quantization.options.check(named, reserved)
        start = self.model.routing_options["start_layer"]
        if not 0 <= start < config.num_hidden_layers:
            raise ValueError(
                f"--model.start_layer {start} is outside the {config.num_hidden_layers} layers of {self.model.name}"
            )
        if routed:
            self.threshold_sweep.options.check_budgets(start / config.num_hidden_layers)
        metrics = self.datamodule.asking.metrics("calibration")
        texts = [task for task, metric in metrics.items() if metric == "perplexity"]
        if texts and self.threshold_sweep.options.rule == "tolerance":
            raise ValueError(
                f"--sweep.rule tolerance compares accuracies question by question, and {', '.join(texts)} has none: "
                "take one-standard-error (by nll, then) or one of the budget rules"
            )
        if self.config["trainer"]["max_steps"] == 0:
            raise ValueError(
                "--trainer.max_steps 0 trains nothing: give a number of steps, or -1 and --trainer.max_epochs"
            )
        if self.config["validations"] < 1:
            raise ValueError(f"--validations {self.config['validations']} must be at least 1")

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
        }
        return L.Trainer(**options)

    def _callbacks(self, run: RunDirectory, steps: int) -> list[Callback]:
        best = ModelCheckpoint(
            dirpath=run.best.parent,
            filename=run.best.stem,
            monitor=BEST,
            mode="min",
            enable_version_counter=False,
        )
        last = LastCheckpoint(run.last, every_n_train_steps=max(1, steps // SAVES))
        for stage in (self.quantization, self.threshold_sweep):
            stage.run = run
        self.threshold_sweep.quantization = self.quantization.options
        monitors = [
            TrainingTotals(run),
            RoutingMonitor(run),
            LearningRateMonitor("step"),
        ]
        if self.config["trainer"]["enable_progress_bar"] is not False:
            monitors.append(TQDMProgressBar(10))
        after = [Export(run), self.quantization, self.threshold_sweep, Report(run)]
        return [*monitors, best, last, *after]

    def _loggers(self, run: RunDirectory) -> list[Logger]:
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


def _seed(seed: bool | int) -> int:
    """``--seed_everything`` as the number that module and data use."""
    return int(seed)
