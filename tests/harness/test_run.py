"""The command `lm-eval` on small runs, through the real harness."""

import copy
import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from qtale_lightning import harness
from qtale_lightning.__main__ import main
from qtale_lightning.cli import QTALECLI
from qtale_lightning.evaluation.scoring import score
from qtale_lightning.models import RoutedForCausalLM, route
from qtale_lightning.models.sources import load_base, load_tokenizer
from qtale_lightning.quantization.checkpoint import quantize_model
from qtale_lightning.quantization.mappings import linear_shapes
from qtale_lightning.quantization.precision import uniform
from qtale_lightning.quantization.recipe import round_to_nearest
from qtale_lightning.run import RunDirectory
from qtale_lightning.stages import load_exported
from tests.llama import llama_config

pytestmark = pytest.mark.slow

needs_harness = pytest.mark.skipif(
    not any(d.name in ("lm_eval", "lm-eval") for d in metadata.distributions()),
    reason="needs requirements-lm-eval.txt",
)

Options = Callable[..., list[str]]


def routed(start_layer: int) -> RoutedForCausalLM:
    """The tiny model, larger weights for answers that differ, and random routers from a layer on."""
    base = load_base("tiny")
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    options = {"model_type": "routed_llama", "start_layer": start_layer, "router_width": 16}
    torch.manual_seed(0)
    model = route(copy.deepcopy(base), llama_config(**base.config.to_dict() | options))
    for layer in model.model.layers[start_layer:]:
        torch.nn.init.normal_(layer.router.out.weight)
    return model.eval()


@pytest.fixture
def run(tmp_path: Path, options: Options, request: pytest.FixtureRequest) -> RunDirectory:
    """A run's configuration and exported model, packed at 4 bits as well."""
    method = getattr(request, "param", "qtale")
    cli = QTALECLI(options("tiny", method, "--data.limit_validation", "6", "--out", str(tmp_path)), "test")
    cli.run.claim(cli.config_text())
    model, tokenizer = routed(2 if method == "qtale" else 6), load_tokenizer("tiny")
    model.save_pretrained(cli.run.model())
    recipe = round_to_nearest(uniform(linear_shapes(model), 4, {}), 32)
    quantize_model(model, recipe)
    model.save_pretrained(cli.run.model(4))
    for bits in (16, 4):
        tokenizer.save_pretrained(cli.run.model(bits))
    return cli.run


@needs_harness
def test_a_run_is_evaluated_and_kept(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    main(["lm-eval", str(run.root), "--theta", "0.4"])
    assert "facts_local" in capsys.readouterr().out
    (row,) = harness.load_evaluations(run.root)
    assert (row["bits"], row["engine"], row["theta"], row["tasks"]) == (16, "none", 0.4, ["facts_local"])
    protocol = row["protocol"]
    assert protocol["harness"] == f"lm-eval {metadata.version('lm_eval')}"
    assert (protocol["limit_validation"], protocol["root"], protocol["prompt_style"]) == (
        6,
        "built-in",
        "cloze",
    )

    # What the run's own evaluation finds on the same questions.
    cli = QTALECLI(["--config", str(run.config)], "test")
    questions = cli.prepare_data().questions("validation")
    scores = score(load_exported(run), questions, 0.4).loglikelihoods
    accuracy = sum(int(s.argmax()) == q.label for s, q in zip(scores, questions, strict=True)) / 6
    found = row["results"]["results"]["facts_local"]
    assert found["acc,none"] == pytest.approx(accuracy)
    assert row["results"]["n-samples"]["facts_local"] == {"original": 6, "effective": 6}


@needs_harness
def test_what_is_there_is_not_evaluated_again(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["lm-eval", str(run.root), "--limit", "2"])
    first = capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr("qtale_lightning.harness.run.evaluate_tasks", None)
        main(["lm-eval", str(run.root), "--limit", "2"])
    assert capsys.readouterr().out == first
    main(["lm-eval", str(run.root), "--limit", "3"])
    assert [row["protocol"]["limit"] for row in harness.load_evaluations(run.root)] == [2, 3]


@needs_harness
def test_a_packed_model_is_evaluated(run: RunDirectory) -> None:
    main(["lm-eval", str(run.root), "--bits", "4", "--limit", "2", "--batch_size", "3"])
    (row,) = harness.load_evaluations(run.root)
    assert (row["bits"], row["engine"], row["theta"]) == (4, "native", 0.5)
    assert row["protocol"]["batch_size"] == "3"
    config = json.loads((run.model(4) / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["bits"] == 4


@needs_harness
@pytest.mark.parametrize("run", ["full"], indirect=True)
def test_a_model_without_routers_has_no_threshold(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["lm-eval", str(run.root), "--theta", "0.5"])
    assert "leave --theta out" in capsys.readouterr().err
    main(["lm-eval", str(run.root), "--limit", "2"])
    (row,) = harness.load_evaluations(run.root)
    assert row["theta"] is None


@needs_harness
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "alpaca,facts", "--data.root", "."], "answered in writing"),
        (["--theta", "1.5"], "--theta 1.5: must be >= 0 and <= 1"),
        (["--limit", "0"], "must be > 0"),
        (["--bits", "3"], "quantize"),
        (["--tasks", "arc_easy"], "--data.root FOLDER"),  # no network in tests
    ],
)
def test_mistakes_are_named(
    run: RunDirectory, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["lm-eval", str(run.root), *arguments])
    assert message in capsys.readouterr().err
    assert not (run.root / "lm_eval.json").exists()


def test_a_missing_harness_is_named(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("qtale_lightning.harness.backend.metadata.version", missing)
    with pytest.raises(SystemExit):
        main(["lm-eval", str(run.root)])
    assert "pip install -r requirements-lm-eval.txt" in capsys.readouterr().err


def test_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lm_eval.json").write_text('{"schema": 99, "evaluations": []}', encoding="utf-8")
    with pytest.raises(ValueError, match="schema 99, not 1"):
        harness.load_evaluations(tmp_path)
