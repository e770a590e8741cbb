"""Engines are declared, each in a file of its own: what one can do is read from there, and from nowhere else."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtale_lightning.__main__ import main
from qtale_lightning.quantization import engines
from qtale_lightning.quantization.engines import DEFAULT, ENGINES, Engine, find, register
from qtale_lightning.quantization.options import QuantizationOptions
from qtale_lightning.results import load_results
from qtale_lightning.run import RunDirectory

PACKAGE = Path(engines.__file__).parents[2]


def test_each_file_declares_one_and_the_default_comes_first() -> None:
    files = {file.stem for file in Path(engines.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert files == set(ENGINES), "a file has the name of its engine"
    assert next(iter(ENGINES)) == DEFAULT
    assert [name for name, engine in ENGINES.items() if engine.default] == [DEFAULT]


def test_no_other_file_names_an_engine() -> None:
    found = []
    for file in PACKAGE.rglob("*.py"):
        if file.parent != Path(engines.__file__).parent:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and node.value in ENGINES:
                    found.append(f"{file.relative_to(PACKAGE)}:{node.lineno}: {node.value}")
    assert found == []


def test_every_option_is_explained_in_the_help() -> None:
    said = QuantizationOptions.__doc__ or ""
    for engine in ENGINES.values():
        assert all(name in engine.explained for name in engine.options)
        assert engine.title in said
        assert engine.explained in said


def test_a_name_is_taken_once_and_one_that_isnt_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ENGINES", dict(ENGINES))
    with pytest.raises(ValueError, match="there is an engine rtn, with files rtn-…, already"):
        register(Engine("rtn", "another", list))
    with pytest.raises(ValueError, match="there is an engine native, with files awq-…, already"):
        register(Engine("awq", "another", list))
    with pytest.raises(
        ValueError, match="'awk': choose one of native, autoawq, gptq, nested, rtn, signround"
    ):
        find("awk")


# ------------------------------------------------------------------------------ an engine that only this file knows

# Everything that the suite needs to know of it is this declaration.


def _load() -> Callable[..., Any]:
    from qtale_lightning.quantization.recipe import Recipe

    def search(
        model: Any, batches: Any, precisions: Any, group_size: int, symmetric: bool, gentle: bool, **_: Any
    ) -> list[Recipe]:
        """Clips nothing, or what AWQ would at most."""
        from qtale_lightning.quantization.recipe import Codes
        from qtale_lightning.quantization.rtn import Scheme, quantize

        recipes = []
        for bits in precisions:
            recipe = Recipe("", dict(bits), group_size, symmetric)
            for name, width in bits.items():
                weight = model.get_parameter(f"{name}.weight").detach().float()
                if not gentle:
                    weight = weight.clamp(-0.5 * weight.abs().max(), 0.5 * weight.abs().max())
                codes, scales, zeros = quantize(weight, Scheme(width, group_size, symmetric))
                recipe.codes[name] = Codes(
                    codes.flatten(1).byte(), scales.squeeze(-1), zeros.squeeze(-1).byte()
                )
            recipes.append(recipe)
        return recipes

    return search


TOY = Engine(
    "toy",
    "clips and rounds",
    _load,
    calibrates=False,
    keeps_codes=True,
    widths=(3, 5),
    options={"gentle": True},
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setitem(ENGINES, TOY.name, TOY)
    return TOY


def test_what_it_cant_is_refused(toy: Engine) -> None:
    shapes = {"model.layers.0.mlp.up_proj": (128, 128)}
    QuantizationOptions(bits=(3, 5), engine="toy").check(shapes, 2)
    for options, says in (
        ({"bits": (4,)}, "the engine toy works at 3, 5 bits, not at 4"),
        (
            {"bits": (3,), "patterns": {"*": 8}},
            r"--quantize\.patterns '\*': the engine toy works at 3, 5 bits",
        ),
        ({"bits": (3.5,)}, "an average of bits is spent by measured errors, and toy measures none"),
        ({"bits": (3,), "options": {"gentle": "no"}}, "gentle must be a bool, such as True, not 'no'"),
        ({"bits": (3,), "sequential": True}, "the engine toy looks at no sequences"),
    ):
        with pytest.raises(ValueError, match=says):
            QuantizationOptions(engine="toy", **options).check(shapes, 2)  # type: ignore[arg-type]


@pytest.mark.slow
def test_it_runs_from_fit_to_report(toy: Engine, options: Callable[..., list[str]], tmp_path: Path) -> None:
    small = (
        *("--data.batch_size", "8", "--data.limit_train", "64", "--data.limit_validation", "24"),
        *("--data.calibration_rows", "8", "--trainer.max_steps", "4", "--sweep.thresholds", "[0.5,0.1]"),
        *("--wandb", "disabled", "--quantize.engine", "toy", "--quantize.bits", "[3]"),
    )
    main(["fit", *options("tiny", "qtale", *small, "--out", str(tmp_path))])
    run = RunDirectory(tmp_path / "tiny-qtale-facts-s0")
    assert run.model(3, "toy") == run.root / "model-toy-3bit"
    config = yaml.safe_load((run.model(3, "toy") / "config.json").read_text(encoding="utf-8"))
    made_from = config["quantization_config"]["made_from"]
    assert (made_from["engine"], made_from["options"], made_from["calibration"]) == (
        "toy",
        {"gentle": True},
        None,
    )
    gentle = [row for row in load_results(run.root)["evaluation"] if row["engine"] == "toy"]
    assert {row["bits"] for row in gentle} == {3}
    assert "3 bits, toy: group_size 32, options {'gentle': True}" in page(run)
    other = ["--quantize.options", json.dumps({"gentle": False})]
    main(["quantize", str(run.root), *other])
    main(["evaluate", str(run.root), "--bits", "3", "--theta", "0.1"])
    (row,) = (row for row in load_results(run.root)["evaluation"] if row["engine"] == "toy")
    before = next(one for one in gentle if (one["theta"], one["split"]) == (row["theta"], row["split"]))
    assert row["average_nll"] != before["average_nll"]
    main(["report", str(run.root)])
    assert "options {'gentle': False}" in page(run)


def page(run: RunDirectory) -> str:
    return (run.root / "results.md").read_text(encoding="utf-8").replace("\\", "")
