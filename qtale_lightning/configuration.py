"""The configuration of a run, and what can be said of it before anything heavy is loaded.

Importing PyTorch, Lightning and transformers takes seconds; this module needs none of them.
"""

import ast
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import SUPPRESS, ActionConfigFile, ArgumentParser, get_loader, set_loader

from qtale_lightning import checks
from qtale_lightning.architectures import architecture_of
from qtale_lightning.data.settings import DataSettings
from qtale_lightning.evaluation import cost
from qtale_lightning.evaluation.options import SweepOptions
from qtale_lightning.experiments import find
from qtale_lightning.quantization.options import MIN_TOKENS, QuantizationOptions
from qtale_lightning.run import RunDirectory
from qtale_lightning.settings import ModelSettings, WandbMode
from qtale_lightning.values import UserPath
from qtale_lightning.yaml_files import check_yaml, read_yaml

DESCRIPTION = "Configuration of a QTALE run."


# Options that take a file of settings.
_FILES = ("-c", "--config", "--model", "--data", "--trainer", "--quantize", "--sweep")


def with_files(args: Sequence[str]) -> list[str]:
    """Arguments whose configuration files are where they were found (`experiments.find`).

    Raises:
        ValueError: One isn't plain YAML; a parser's own message wouldn't name it.
    """
    found = [*args]
    for index, argument in enumerate(args):
        option, equals, value = argument.partition("=")
        at = index if equals else index + 1
        if option not in _FILES or at >= len(args):
            continue
        path = find(value if equals else args[at])
        found[at] = f"{option}={path}" if equals else str(path)
        if path.is_file():
            content = read_yaml(path)
            if not isinstance(content, dict):
                kind = "empty" if content is None else f"a {type(content).__name__}"
                raise ValueError(f"{path} is {kind}, not a configuration of options and values (key: value)")
    return found


def _load_checked(text: str) -> Any:
    check_yaml(text, "a configuration")
    return _load(text)


_load = get_loader("yaml")
set_loader("yaml", _load_checked)  # files that a file names, too


def usage(prog: str) -> str:
    """One line: all options are a page before every error."""
    return f"{prog} [--config FILE …] [OPTIONS]"


def add_run_options(parser: ArgumentParser) -> None:
    """The suite's own options, beside --model, --data and --trainer."""
    parser.add_argument(
        "--out", type=UserPath, default=UserPath("outputs"), help="Folder that run directories are made in."
    )
    parser.add_argument(
        "--ckpt_path",
        type=UserPath | None,
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
    parser.add_class_arguments(QuantizationOptions, "quantize")
    parser.add_class_arguments(SweepOptions, "sweep")
    for target in ("model.seed", "data.seed"):
        parser.link_arguments("seed_everything", target, compute_fn=_seed)


def section_help(section: str) -> str:
    """What the options of ``--quantize`` or ``--sweep`` are, as `fit --help` says it."""
    parser = ArgumentParser(usage=SUPPRESS, add_help=False)
    parser.add_class_arguments({"quantize": QuantizationOptions, "sweep": SweepOptions}[section], section)
    return parser.format_help().strip()


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


# What a class of the trainer's options is made with: `fit` alone knows those classes.
_PART = re.compile(r"--trainer\.(callbacks|logger|plugins|profiler|strategy)[.+]")


def _without_parts(args: Sequence[str]) -> list[str]:
    """Arguments without those, each with its value, which may be joined by = or stand behind it."""
    return [
        argument
        for before, argument in zip(["", *args], args, strict=False)
        if not _PART.match(argument) and not (_PART.match(before) and "=" not in before)
    ]


class PlannedRun(RunConfiguration):
    """A configuration that is only looked at: parsed as ``fit`` parses it, in a fraction of the time."""

    def __init__(self, args: list[str], prog: str) -> None:
        args = with_files(args)
        parser = ArgumentParser(prog=prog, usage=usage(prog), description=DESCRIPTION, exit_on_error=False)
        parser.add_argument(
            "-c",
            "--config",
            action=ActionConfigFile,
            help="Path to a configuration file in json or yaml format.",
        )
        parser.add_argument("--seed_everything", type=bool | int, default=0, help="Seed of the run.")
        for name, (kind, default) in trainer_options().items():
            parser.add_argument(f"--trainer.{name}", type=kind, default=default, help="Lightning's.")
        parser.add_class_arguments(ModelSettings, "model")
        parser.add_class_arguments(DataSettings, "data")
        add_run_options(parser)
        self.config = parser.parse_args(_without_parts(args))
        self.config_init = parser.instantiate(self.config)
        self.model, self.datamodule = self.config_init["model"], self.config_init["data"]


_TYPES: dict[str, Any] = {
    "int": int,
    "bool": bool,
    "Optional[int]": int | None,
    "Optional[bool]": bool | None,
    "Union[int, float]": int | float,
    "Optional[Union[int, float]]": int | float | None,
}


def trainer_options() -> dict[str, tuple[Any, Any]]:
    """Type and default of every option of Lightning's Trainer, read from its source.

    Types that need Lightning to be understood are Any: ``fit`` checks those.
    """
    lightning = find_spec("lightning")  # finds it, and imports nothing
    assert lightning is not None
    folder = Path(str(lightning.origin)).parent
    source = (folder / "pytorch" / "trainer" / "trainer.py").read_text(encoding="utf-8")
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    trainer = next(node for node in classes if node.name == "Trainer")
    methods = (node for node in trainer.body if isinstance(node, ast.FunctionDef))
    options = next(node for node in methods if node.name == "__init__").args
    return {
        argument.arg: (
            _TYPES.get(ast.unparse(argument.annotation) if argument.annotation else "", Any),
            ast.literal_eval(default) if default is not None else None,
        )
        for argument, default in zip(options.kwonlyargs, options.kw_defaults, strict=True)
    }


def _seed(seed: bool | int) -> int:
    """``--seed_everything`` as the number that module and data use (ValueError: no generator takes it)."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed_everything {seed} must be from 0 to {2**32 - 1}")
    return int(seed)
