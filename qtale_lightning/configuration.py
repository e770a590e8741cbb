"""The configuration of a run, and what can be said of it before anything heavy is loaded.

Importing PyTorch, Lightning and transformers takes seconds; this module needs none of them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtale_lightning import checks
from qtale_lightning.architectures import architecture_of
from qtale_lightning.data.settings import DataSettings
from qtale_lightning.evaluation import cost
from qtale_lightning.evaluation.options import SweepOptions
from qtale_lightning.options import run_parser, with_files, without_lightnings
from qtale_lightning.quantization.options import MIN_TOKENS, QuantizationOptions
from qtale_lightning.run import RunDirectory
from qtale_lightning.settings import ModelSettings
from qtale_lightning.values import plain_numbers


class RunConfiguration:
    """A parsed configuration, checked. :class:`~qtale_lightning.cli.QTALECLI` makes what trains from it."""

    model: ModelSettings
    datamodule: DataSettings
    config: Any
    config_init: Any

    @property
    def run(self) -> RunDirectory:
        """The run's directory, named by what it runs."""
        name = f"{self.model.name}-{self.model.method}-{self.datamodule.label}-s{self.model.seed}"
        return RunDirectory(Path(self.config["out"]) / name)

    @property
    def quantization(self) -> QuantizationOptions:
        """What to make of the exported model."""
        return self.config_init["quantize"]

    @property
    def sweep(self) -> SweepOptions:
        """What to measure of it."""
        return self.config_init["sweep"]

    @property
    def devices(self) -> int:
        """Of all nodes: as given, or what this machine has (ValueError: it hasn't them)."""
        trainer = self.config["trainer"]
        devices, nodes = (
            str(trainer["devices"]),
            trainer["num_nodes"],
        )  # the parser leaves numbers as text, too
        if devices.isdecimal() and int(devices) > 0:
            return int(devices) * nodes
        from qtale_lightning.strategy import count_devices

        return count_devices(trainer["accelerator"], trainer["devices"]) * nodes

    @property
    def reserved_tokens(self) -> int:
        """Tokens of a sequence that every layer sees for certain, as far as a quantization's search needs them."""
        return self.model.routing_options["reserved_tokens"] if self.model.how.decides else MIN_TOKENS

    def check(self) -> None:
        """Refuse what can't work before anything expensive starts (ValueError)."""
        config = self.model.shape
        shapes = architecture_of(config).shapes(config)
        layers = [f"model.layers.{i}" for i in range(config.num_hidden_layers)]
        named = {f"{layer}.{name}": shape for layer in layers for name, shape in shapes.items()}
        self.quantization.check(named, self.reserved_tokens)
        start, layers_of_base = self.model.routing_options["start_layer"], cost.base_layers(config)
        if not 0 <= start < layers_of_base:
            raise ValueError(
                f"--model.start_layer {start} is outside the {layers_of_base} layers of {self.model.name}"
            )
        if not self.model.train_all and self.model.lora_options["rank"] > config.hidden_size:
            raise ValueError(
                f"--model.lora_rank {self.model.lora_options['rank']} is above the width {config.hidden_size} of "
                f"{self.model.name}, whose weights have no higher rank: give a smaller one, or --model.train_all true"
            )
        if (rank := self.model.routing_options["stand_in_rank"]) > config.hidden_size:
            raise ValueError(
                f"--model.stand_in_rank {rank} is above the width {config.hidden_size} of {self.model.name}: give a "
                "smaller one"
            )
        if self.quantization.refit_routers and self.model.routing_options["gates"] == "sublayer":
            raise ValueError(
                "--quantize.refit_routers fits routers that decide about layers, and with --model.gates sublayer none "
                "does: leave one of them out"
            )
        if self.model.how.theta:
            self.sweep.check_budgets(start / config.num_hidden_layers)
        metrics = self.datamodule.asking.metrics("calibration")
        texts = [task for task, metric in metrics.items() if metric == "perplexity"]
        if texts and self.sweep.rule == "tolerance":
            raise ValueError(
                f"--sweep.rule tolerance compares accuracies question by question, and {', '.join(texts)} has none: "
                "take one-standard-error (by nll, then) or one of the budget rules"
            )

    def check_training(self) -> None:
        """Refuse what can't be trained, or not as the options of the trainer ask (ValueError)."""
        checks.check_trainer(self.config["trainer"], self.config["validations"])
        self.model.check_teacher()


class PlannedRun(RunConfiguration):
    """A configuration that is only looked at: parsed as ``fit`` parses it, in a fraction of the time."""

    def __init__(self, args: Sequence[str], prog: str) -> None:
        parser = run_parser(prog)
        self.config = plain_numbers(parser.parse_args(without_lightnings(with_files(args))))
        self.config_init = parser.instantiate(self.config)
        self.model, self.datamodule = self.config_init["model"], self.config_init["data"]
