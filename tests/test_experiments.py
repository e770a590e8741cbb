"""Every experiment file parses into a run that can start, without data or weights."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qtale_lightning.architectures import ARCHITECTURES
from qtale_lightning.cli import QTALECLI
from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.module import QTALEModule
from qtale_lightning.routing import METHODS

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
# Results keep the resolved configuration of a run that was, which nobody starts from.
EXPERIMENT_FILES = [file for file in sorted(EXPERIMENTS.rglob("*.yaml")) if "results" not in file.parts]
MODELS = sorted(file.stem for file in (EXPERIMENTS / "models").glob("*.yaml"))
Options = Callable[..., list[str]]


def test_every_model_and_method_has_a_file() -> None:
    from qtale_lightning.architectures import known_models

    assert set(MODELS) == set(known_models())
    assert {file.stem for file in (EXPERIMENTS / "methods").glob("*.yaml")} == set(METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_model_and_method_make_a_run(
    model: str, method: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untouchable(*args: object, **kwargs: object) -> None:
        pytest.fail("weights, tokenizer or rows are read to parse a configuration")

    monkeypatch.setattr(QTALEModule, "configure_model", untouchable)
    monkeypatch.setattr("qtale_lightning.module.load_tokenizer", untouchable)
    monkeypatch.setattr(CommonsenseDataModule, "setup", untouchable)
    cli = QTALECLI(options(model, method, "--out", "somewhere"), "fit")
    cli.check()
    assert (cli.model.name, cli.model.method) == (model, method)
    assert cli.run.root == Path("somewhere") / f"{model}-{method}-facts-s0"


@pytest.mark.parametrize(
    ("method", "more", "off"),
    [("qtale-plus", (), "keep_kv false"), ("qtale", ("--model.gates", "sublayer"), "gates layer")],
)
def test_what_whole_layers_cannot_do_is_refused(
    options: Options, monkeypatch: pytest.MonkeyPatch, method: str, more: tuple[str, ...], off: str
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "gemma3_text", replace(ARCHITECTURES["gemma3_text"], fused=False))
    given = options("gemma3-270m", method, *more)
    with pytest.raises(ValueError, match=rf"layers are computed whole: give --model\.{off}"):
        QTALECLI(given, "fit")


@pytest.mark.parametrize("file", EXPERIMENT_FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_an_experiment_file_begins_with_its_command(file: Path) -> None:
    comments = [line for line in file.read_text(encoding="utf-8").splitlines()[:3] if line.startswith("#")]
    assert any("make train" in line or "make table" in line for line in comments)


def test_a_method_changes_nothing_but_the_objective() -> None:
    """Methods are compared with each other: what else differed would be compared too."""
    for method in METHODS:
        content = yaml.safe_load((EXPERIMENTS / f"methods/{method}.yaml").read_text(encoding="utf-8"))
        assert content.keys() == {"model"}
        objective = {"method", "lambda_ratio", "lambda_entropy", "lambda_prediction"}
        parts = {"target_ratio", "keep_kv", "lora_rank", "lora_targets"}
        recipe = parts if method == "qtale-plus" else set()
        assert content["model"].keys() <= objective | recipe
