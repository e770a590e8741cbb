"""What a command imports: help and a plan don't wait for PyTorch, Lightning, transformers, W&B or datasets."""

import re
import subprocess
import sys
from argparse import ArgumentError
from collections.abc import Callable

import pytest

from qtale_lightning.__main__ import COMMANDS
from qtale_lightning.configuration import trainer_options

HEAVY = {
    "torch",
    "lightning",
    "transformers",
    "wandb",
    "datasets",
    "torchmetrics",
    "peft",
    "pandas",
    "matplotlib",
}

Options = Callable[..., list[str]]


def imported(*arguments: str) -> set[str]:
    """Top-level packages that ``python <arguments>`` imports; it must end well."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = re.findall(r"^import time:[^|]*\|[^|]*\|\s*([\w.]+)$", done.stderr, flags=re.MULTILINE)
    assert names
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize(
    "arguments",
    [["--help"], [], *([command, "--help"] for command in COMMANDS if command != "fit")],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert not HEAVY & imported("-m", "qtale_lightning", *arguments)


def test_a_plan_imports_nothing_heavy(options: Options) -> None:
    assert not HEAVY & imported("-m", "qtale_lightning", "plan", *options("llama2-7b", "qtale"))


@pytest.mark.slow
def test_importing_the_package_registers_its_models_with_transformers() -> None:
    code = (
        "import qtale_lightning, transformers\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert 'routed_llama' in transformers.CONFIG_MAPPING and 'qtale' in AUTO_QUANTIZER_MAPPING\n"
        "assert transformers.AutoConfig.for_model('routed_llama').__class__ is qtale_lightning.RoutedConfig\n"
    )
    assert "transformers" in imported("-c", code)


def test_the_planned_options_of_the_trainer_are_lightnings() -> None:
    from inspect import signature

    from lightning.pytorch import Trainer

    planned = {name: default for name, (_, default) in trainer_options().items()}
    parameters = signature(Trainer.__init__).parameters.values()
    assert planned == {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--trainer.maximum", "5"),
        ("--trainer.max_steps", "ten"),
        ("--model.lora_rank", "eight"),
        ("--data.rows", "5"),
        ("--quantize.group_size", "many"),
    ],
)
def test_a_plan_refuses_options_that_training_would_refuse(option: str, value: str, options: Options) -> None:
    from qtale_lightning.configuration import PlannedRun

    with pytest.raises(ArgumentError, match=option.removeprefix("--")):
        PlannedRun([*options(), option, value], "plan")
