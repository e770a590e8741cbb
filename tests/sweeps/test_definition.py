"""Sweep files: W&B's format, what it allows, and the command line that an agent makes of it."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from qtale_lightning.sweeps.definition import SweepDefinition, read_sweep

SWEEPS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))
ENVIRONMENT = {
    "MODEL": "tiny",
    "DATA": "facts",
    "SEED": "3",
    "OUT": "runs",
    "RUN": "runs/tiny-qtale-facts-s3",
}


def agents_command(sweep: SweepDefinition, point: dict[str, Any]) -> list[str]:
    """What W&B's agent runs, made by its own functions (`Agent._command_run`)."""
    given = create_sweep_command_args({"args": {name: {"value": value} for name, value in point.items()}})
    known = {**given, "interpreter": ["python"], "program": [sweep.program], "env": ["/usr/bin/env"]}
    parts = create_sweep_command(list(sweep.command))
    return [
        argument for part in parts for argument in (known[part[2:-1]] if part.startswith("${") else [part])
    ]


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_file_is_a_sweep_and_says_how_to_start_it(file: Path) -> None:
    sweep = read_sweep(file)
    assert sweep.name == file.stem
    assert f"make sweep SWEEP={sweep.name}" in file.read_text(encoding="utf-8").splitlines()[0]
    assert set(sweep.variables()) <= set(ENVIRONMENT)


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_file_follows_wandbs_own_schema(file: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="W&B's schema is checked by jsonschema")
    engine = importlib.util.find_spec("sweeps")
    if (
        engine is None
        or engine.origin is None
        or "config" not in {p.name for p in Path(engine.origin).parent.iterdir()}
    ):
        pytest.skip("W&B's package `sweeps`, which holds its schema, isn't installed")
    schema = json.loads((Path(engine.origin).parent / "config" / "schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(yaml.safe_load(file.read_text(encoding="utf-8")), schema)


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_an_agent_and_the_local_runner_make_the_same_command(file: Path) -> None:
    sweep = read_sweep(file).resolved(ENVIRONMENT, ["--data.limit_train", "8"])
    point = {name: (declared.get("values") or [0.25])[0] for name, declared in sweep.parameters.items()}
    start = ["/usr/bin/env", "python", "-m", "qtale_lightning", "sweep", "trial"]
    assert agents_command(sweep, point) == [*start, *sweep.arguments(point)]
    assert sweep.variables() == []


def test_options_for_every_run_come_before_the_parameters(define: Callable[..., SweepDefinition]) -> None:
    sweep = define().resolved({"OUT": "runs"}, ["--a", "b c"])
    assert sweep.arguments({"model.lr": 0.1}) == ["--to=runs/x", "fit", "--a", "b c", "--", "--model.lr=0.1"]


def test_a_missing_variable_is_named_with_the_command(define: Callable[..., SweepDefinition]) -> None:
    with pytest.raises(ValueError, match=r"sweep x needs OUT: make sweep SWEEP=x OUT=…"):
        define().resolved({"OUT": ""})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"method": "gird"}, ("x.yaml", "method")),
        ({"parameters": {}}, ("x.yaml", "parameters")),
        ({"parameters": None}, ("x.yaml", "parameters")),
        ({"metric": {"nmae": "loss"}}, ("x.yaml", "metric.name")),
        ({"run_cap": 0}, ("x.yaml", "run_cap")),
        ({"parameters": {"model": {"parameters": {"lr": {"value": 1}}}}}, ("parameters.model", "model.lr")),
        ({"command": ["${program}", "${args}"]}, ("x.yaml: command", "trial")),
    ],
    ids=str,
)
def test_a_wrong_file_is_refused_by_file_and_key(
    define: Callable[..., SweepDefinition], keys: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=r"x\.yaml") as refusal:
        define(**keys)
    assert [word for word in words if word not in str(refusal.value)] == []


def test_an_unknown_sweep_lists_the_known(tmp_path: Path) -> None:
    (tmp_path / "lambda2.yaml").write_text("", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"known in .*: lambda2"):
        read_sweep(tmp_path / "lamda2.yaml")
