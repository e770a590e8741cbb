"""The options of a run, declared once for every command that takes them.

Importing PyTorch, Lightning and transformers takes seconds; this module needs none of them.
"""

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import field, make_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from jsonargparse import SUPPRESS, ActionConfigFile, ArgumentParser, get_loader, set_loader
from jsonargparse.typing import PositiveInt, register_type

from qtale_lightning import checks
from qtale_lightning.data.settings import DataSettings
from qtale_lightning.evaluation.options import SweepOptions
from qtale_lightning.experiments import find
from qtale_lightning.quantization.options import QuantizationOptions
from qtale_lightning.settings import ModelSettings, WandbMode
from qtale_lightning.values import UserPath
from qtale_lightning.yaml_files import check_yaml, read_yaml

# Options that take a file of settings.
_FILES = ("-c", "--config", "--model", "--data", "--trainer", "--quantize", "--sweep")

# Of the trainer's options, those that the suite's own configurations set, and what is often added to them.
SHOWN = (
    *("accelerator", "devices", "num_nodes", "strategy", "precision", "max_steps", "max_epochs"),
    *("accumulate_grad_batches", "gradient_clip_val", "log_every_n_steps", "num_sanity_val_steps"),
    *("enable_model_summary", "callbacks", "logger"),
)

_TITLES = {
    "model": "The model, its routers and its training",
    "data": "The data",
    "trainer": "Lightning's Trainer",
    "quantize": "Quantization of the trained model",
    "sweep": "Measuring each precision, and choosing θ on held-out training questions",
}

# What LightningCLI answers alone: it knows the classes that a class of the trainer's options may be.
_LIGHTNINGS = re.compile(r"--trainer\.(callbacks|logger|plugins|profiler|strategy)[.+]")


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
        type=PositiveInt,
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


def run_parser(prog: str, **texts: Any) -> ArgumentParser:
    """A parser of all options of a run, with Lightning's Trainer as far as it is known without Lightning."""
    parser = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False, **texts)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML of options; later ones win.")
    parser.add_argument("--seed_everything", type=bool | int, default=0, help="Seed of the run.")
    parser.add_class_arguments(ModelSettings, "model")
    parser.add_class_arguments(DataSettings, "data")
    parser.add_class_arguments(trainer_options(), "trainer")
    add_run_options(parser)
    return parser


def options_help(shown: Callable[[str], bool]) -> str:
    """What those options of a run are that are shown, by their names: a part of a command's help."""
    parser = run_parser("", usage=SUPPRESS, add_help=False)
    for action in parser._actions:
        if not shown(action.dest):
            action.help = SUPPRESS
    parser._optionals.title = "The run"
    for name, group in (parser.groups or {}).items():
        group.title = _TITLES[name]
    return parser.format_help().strip()


def of_training(name: str) -> bool:
    """Whether an option is shown where all of a run's are: not those of the trainer that hardly anybody needs."""
    section, _, option = name.rpartition(".")
    return option in SHOWN if section == "trainer" else option != "seed"  # which --seed_everything sets


def of_the_trainer(name: str) -> bool:
    """Whether an option is Lightning's, and not one that the suite sets itself."""
    section, _, option = name.rpartition(".")
    return section == "trainer" and option not in checks.OWNED


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


def without_lightnings(args: Sequence[str]) -> list[str]:
    """Arguments without those that LightningCLI alone understands, each with its value, joined by = or behind it."""
    return [
        argument
        for before, argument in zip(["", *args], args, strict=False)
        if not _LIGHTNINGS.match(argument)
        and not (_LIGHTNINGS.match(before) and "=" not in before and not argument.startswith("--"))
    ]


class TrainerPrecision(str):
    """A value of ``--trainer.precision``: one of the literals of Lightning's own types of it, as text."""

    @staticmethod
    def read(value: Any) -> "TrainerPrecision":
        """From what was written (ValueError)."""
        types = {
            ast.unparse(node.targets[0]): node.value
            for node in _source("fabric/plugins/precision/precision.py")
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript)
        }
        names = ("_PRECISION_INPUT_STR", "_PRECISION_INPUT_STR_ALIAS")  # its whole numbers are among these
        choices = [choice for name in names for choice in ast.literal_eval(types[name].slice)]
        if str(value) not in choices:
            raise ValueError(f"choose one of {', '.join(choices)}")
        return TrainerPrecision(value)


register_type(TrainerPrecision, str, TrainerPrecision.read)

_TYPES: dict[str, Any] = {
    "int": int,
    "bool": bool,
    "Optional[int]": int | None,
    "Optional[bool]": bool | None,
    "Union[int, float]": int | float,
    "Optional[Union[int, float]]": int | float | None,
    "Union[int, bool]": int | bool,
    "Optional[Union[bool, _LITERAL_WARN]]": bool | Literal["warn"] | None,
    "Optional[_PRECISION_INPUT]": TrainerPrecision | None,
}


def trainer_options() -> type:
    """The options of Lightning's Trainer as a dataclass, with its docstring, read from its source.

    Types that need Lightning to be understood are Any: ``fit`` checks those.
    """
    classes = (node for node in _source("pytorch/trainer/trainer.py") if isinstance(node, ast.ClassDef))
    trainer = next(node for node in classes if node.name == "Trainer")
    methods = (node for node in trainer.body if isinstance(node, ast.FunctionDef))
    made = next(node for node in methods if node.name == "__init__")
    fields = []
    for argument, default in zip(made.args.kwonlyargs, made.args.kw_defaults, strict=True):
        kind = _TYPES.get(ast.unparse(argument.annotation) if argument.annotation else "", Any)
        value = ast.literal_eval(default) if default is not None else None
        fields.append((argument.arg, kind, field(default=value)))
    options = make_dataclass("Trainer", fields)
    options.__doc__ = re.sub(r":\w+:`~?([^`]*)`", r"\1", ast.get_docstring(made) or "").replace("``", "")
    return options


def _source(file: str) -> list[ast.stmt]:
    """A source file of Lightning, parsed."""
    lightning = find_spec("lightning")  # finds it, and imports nothing
    assert lightning is not None
    return ast.parse((Path(str(lightning.origin)).parent / file).read_text(encoding="utf-8")).body


def _load_checked(text: str) -> Any:
    check_yaml(text, "a configuration")
    return _load(text)


_load = get_loader("yaml")
set_loader("yaml", _load_checked)  # files that a file names, too


def _seed(seed: bool | int) -> int:
    """``--seed_everything`` as the number that module and data use (ValueError: no generator takes it)."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed_everything {seed} must be from 0 to {2**32 - 1}")
    return int(seed)
