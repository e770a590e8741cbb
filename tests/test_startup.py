"""What a command imports: help and a plan don't wait for PyTorch, Lightning, transformers, W&B or datasets."""

import re
import subprocess
import sys
from argparse import ArgumentError
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from qtale_lightning.commands import COMMANDS
from qtale_lightning.commands.parser import Group
from qtale_lightning.options import SHOWN, trainer_options
from qtale_lightning.yaml_files import read_yaml

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


def calls(group: Group = COMMANDS) -> list[list[str]]:
    """Every command, as it is called, with those that others have."""
    return [
        [name, *more]
        for name, command in group.commands.items()
        for more in ([[], *calls(command)] if isinstance(command, Group) else [[]])
    ]


@pytest.mark.parametrize("command", [[], *calls()], ids=" ".join)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    assert not HEAVY & imported("-m", "qtale_lightning", *command, "--help")


@pytest.mark.parametrize("arguments", [[], ["fit", "--trainer.help"]], ids=" ".join)
def test_nor_do_other_lists(arguments: list[str]) -> None:
    assert not HEAVY & imported("-m", "qtale_lightning", *arguments)


def test_a_plan_imports_nothing_heavy(options: Options) -> None:
    assert not HEAVY & imported("-m", "qtale_lightning", "plan", *options("llama2-7b", "qtale"))


@pytest.mark.slow
def test_importing_the_package_registers_its_models_with_transformers() -> None:
    code = (
        "import qtale_lightning, transformers\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert 'routed_llama' in transformers.CONFIG_MAPPING and 'qtale' in AUTO_QUANTIZER_MAPPING\n"
        "assert isinstance(transformers.AutoConfig.for_model('routed_llama'), qtale_lightning.RoutedConfig)\n"
    )
    assert "transformers" in imported("-c", code)


def test_the_planned_options_of_the_trainer_are_lightnings() -> None:
    from inspect import signature

    from lightning.pytorch import Trainer

    planned = {one.name: one.default for one in fields(trainer_options())}
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


def test_fits_help_shows_what_the_suites_configurations_set_of_the_trainer() -> None:
    files = (Path(__file__).parent.parent / "experiments").rglob("*.yaml")
    sections = (read_yaml(file) for file in files if "results" not in file.parts)
    used = {name for section in sections for name in section.get("trainer", {})}
    assert used
    assert used <= {*SHOWN}


@pytest.mark.slow
def test_lightnings_lines_come_once_and_without_the_seed() -> None:
    script = (
        "from qtale_lightning.__main__ import _configure; _configure(); "
        "import lightning as L; from lightning.pytorch.utilities import rank_zero_info; "
        "L.seed_everything(7); rank_zero_info('a line')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (done.stderr + done.stdout).count("a line") == 1
    assert "Seed set" not in done.stderr + done.stdout
