"""The whole job at tiny size, once per method: fit, export, AWQ, sweep, report, and each stage again alone."""

import csv
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtale_lightning.__main__ import main
from qtale_lightning.models import RoutedForCausalLM, Routing
from qtale_lightning.module import MEASURED, QTALEModule
from qtale_lightning.quantization.linear import QuantizedLinear
from qtale_lightning.results.store import load_results
from qtale_lightning.routing import METHODS
from qtale_lightning.run import RunDirectory
from tests.tolerance import close, depth

pytestmark = pytest.mark.slow

# These train every weight, as the tiny model does by default; the others train LoRA, which is merged afterwards.
TRAIN_ALL = {"dllm", "mod"}
GROUP = 32
THRESHOLDS = (0.5, 0.1)
SMALL = (
    *("--data.batch_size", "8", "--data.limit_train", "64", "--data.limit_validation", "24"),
    *("--data.calibration_rows", "8", "--trainer.max_steps", "8", "--trainer.log_every_n_steps", "1"),
    # 32 sequences × 2 reserved tokens: enough for the search even in a layer that routers always skip.
    *("--validations", "2", "--quantize.sequences", "32", "--sweep.thresholds", str([*THRESHOLDS])),
    # Routers that learn fast enough to skip something after 8 steps.
    *("--model.router_lr", "3e-2", "--model.ratio_schedule", "0", "--wandb", "offline"),
)


@dataclass(frozen=True)
class Run:
    """A finished run and what it was started with."""

    method: str
    root: Path
    command: list[str]

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.root)

    def results(self) -> dict[str, Any]:
        return dict(load_results(self.root))

    def thresholds(self) -> tuple[float | None, ...]:
        return THRESHOLDS if METHODS[self.method].theta else (None,)

    def model(self, folder: str = "model") -> RoutedForCausalLM:
        return AutoModelForCausalLM.from_pretrained(self.root / folder).eval()

    def checkpoint(self, name: str = "best") -> dict[str, Any]:
        return torch.load(self.root / "checkpoints" / f"{name}.ckpt", weights_only=True)

    def module(self) -> QTALEModule:
        """A new module of the run's configuration, with the best checkpoint's weights."""
        config = yaml.safe_load((self.root / "config.yaml").read_text(encoding="utf-8"))
        module = QTALEModule(**config["model"], seed=config["seed_everything"])
        module.measured = self.checkpoint()[MEASURED]
        module.configure_model()
        module.load_state_dict(self.checkpoint()["state_dict"])
        return module.eval()


MakeRun = Callable[[str], Run]


@pytest.fixture(scope="module")
def finished(options: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """The finished run of a method; made when it is first asked for."""
    runs: dict[str, Run] = {}

    def make(method: str) -> Run:
        if method not in runs:
            out = tmp_path_factory.mktemp(method)
            train_all = str(method in TRAIN_ALL).lower()
            more = (*SMALL, "--model.train_all", train_all, "--out", str(out))
            command = ["fit", *options("tiny", method, *more)]
            main(command)
            runs[method] = Run(method, out / f"tiny-{method}-facts-s0", command)
        return runs[method]

    return make


@pytest.fixture
def run(finished: MakeRun, request: pytest.FixtureRequest) -> Run:
    """The finished run of the method that a test is parametrized by."""
    return finished(request.param)


each_method = pytest.mark.parametrize("run", METHODS, indirect=True)
qtale = pytest.mark.parametrize("run", ["qtale"], indirect=True)


def probe() -> Tensor:
    """Token ids ``(3, 20)``."""
    return torch.randint(3, 768, (3, 20), generator=torch.Generator().manual_seed(0))


def logits(model: RoutedForCausalLM, threshold: float | None = None) -> Tensor:
    with torch.no_grad():
        return model(probe(), routing=Routing(threshold=threshold)).logits


def grid(rows: list[dict[str, Any]]) -> set[tuple[int, float | None, str]]:
    return {(row["bits"], row["theta"], row["split"]) for row in rows}


def written(root: Path) -> dict[str, int]:
    """When the models, searches and checkpoints of a run were written."""
    files = [*root.glob("model*/*"), *root.glob("awq-search*"), *root.glob("checkpoints/*")]
    return {str(file): file.stat().st_mtime_ns for file in files}


# ---------------------------------------------------------------------------------------------- what a run is


@each_method
def test_a_run_has_all_its_parts(run: Run) -> None:
    parts = ["config.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "metrics.csv", "results.md"]
    parts += ["awq-search-4bit.safetensors", "awq-search-3bit.safetensors"]
    for folder in ("model", "model-awq-4bit", "model-awq-3bit"):
        parts += [f"{folder}/{file}" for file in ("config.json", "model.safetensors", "tokenizer.json")]
    parts.append("model/README.md")
    assert [part for part in parts if not (run.root / part).is_file()] == []
    assert list((run.root / "plots").glob("*.png"))
    assert not list(run.root.rglob("*.tmp")), "an unfinished file was left behind"


@each_method
def test_results_are_complete(run: Run) -> None:
    results = run.results()
    assert results["run"]["method"] == run.method
    assert results["run"]["command"].startswith("python -m qtale_lightning fit --config")
    assert results["train"]["steps"] == 8
    assert results["train"]["examples"] == 64
    assert ("routing" in results) == METHODS[run.method].decides


@each_method
def test_every_precision_is_evaluated_at_every_threshold(run: Run) -> None:
    """θ is chosen on calibration questions, where there is one to choose."""
    results = run.results()
    splits = ("validation", "calibration") if METHODS[run.method].theta else ("validation",)
    expected = {(bits, theta, split) for bits in (16, 4, 3) for theta in run.thresholds() for split in splits}
    assert grid(results["evaluation"]) == expected
    assert len(results["evaluation"]) == len(expected)
    for row in results["evaluation"]:
        assert row["examples"] == (24 if row["split"] == "validation" else 8)


@each_method
def test_one_threshold_is_selected_at_each_precision(run: Run) -> None:
    results = run.results()
    assert [choice["bits"] for choice in results["selected"]] == [16, 4, 3]
    for choice in results["selected"]:
        (row,) = [
            row
            for row in results["evaluation"]
            if (row["bits"], row["theta"], row["split"]) == (choice["bits"], choice["theta"], "validation")
        ]
        assert choice["average"] == row["average"]
        assert choice["execution_ratio"] == row["execution_ratio"]


@each_method
def test_every_method_but_full_skips_layers(run: Run) -> None:
    ratios = [row["execution_ratio"] for row in run.results()["evaluation"]]
    if run.method == "full":
        assert set(ratios) == {1.0}
    elif run.method == "static":
        assert set(ratios) == {0.5}
    else:
        assert min(ratios) < 1.0


@each_method
def test_the_metrics_table_has_every_step_once(run: Run) -> None:
    with (run.root / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(8))
    assert sum(bool(row["val/loss"]) for row in rows) == 2


@each_method
def test_wandb_has_a_record(run: Run) -> None:
    (record,) = run.root.glob("wandb/offline-run-*/run-*.wandb")
    assert record.stat().st_size > 0


# ------------------------------------------------------------------------------------------ weights and models


@each_method
def test_checkpoints_hold_exactly_the_trainable_weights(run: Run) -> None:
    module = run.module()
    trainable = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
    for name in ("best", "last"):
        state = run.checkpoint(name)["state_dict"]
        assert {key: value.shape for key, value in state.items()} == trainable
        assert bool(run.checkpoint(name)[MEASURED]) == METHODS[run.method].measures
    assert run.results()["train"]["trainable_parameters"] == sum(s.numel() for s in trainable.values())
    if run.method in TRAIN_ALL:
        assert len(trainable) == len(list(module.parameters()))
    else:
        assert all(".router." in name or "lora_" in name for name in trainable)
    assert any(".router." in name for name in trainable) == METHODS[run.method].routers


@each_method
def test_training_moved_the_weights(run: Run) -> None:
    untrained = run.module().fresh()
    untrained.configure_model()
    before, after = untrained.state_dict(), run.checkpoint()["state_dict"]
    assert all(not torch.equal(before[name], after[name]) for name in before)


@each_method
def test_the_exported_model_is_the_merged_checkpoint(run: Run) -> None:
    module = run.module()
    exported = run.model()
    # Merged weights are rounded once more, as sums in another order are.
    close(logits(exported, 0.0), logits(module.model, 0.0), depth(exported.config))
    merged = module.merge()
    assert torch.equal(logits(exported), logits(merged))
    assert not any("lora" in name for name, _ in exported.named_parameters())
    assert list(exported.config.routed_layers) == ([2, 3, 4, 5] if METHODS[run.method].decides else [])


@each_method
def test_the_exported_model_generates_what_greedy_decoding_gives(run: Run) -> None:
    model, tokenizer = run.model(), AutoTokenizer.from_pretrained(run.root / "model")
    prompt = tokenizer("Question: What is a brick made of?\nAnswer:", return_tensors="pt")["input_ids"]
    generated: Any = model.generate(prompt, max_new_tokens=12, do_sample=False)  # type: ignore[misc]
    expected = prompt
    with torch.no_grad():
        while expected.shape[1] < prompt.shape[1] + 12 and expected[0, -1] != tokenizer.eos_token_id:
            whole = model(expected, routing=Routing(execution="masked"), use_cache=False).logits
            expected = torch.cat([expected, whole[:, -1:].argmax(-1)], dim=1)
    assert expected.shape[1] > prompt.shape[1]
    assert generated.tolist() == expected.tolist()


@each_method
@pytest.mark.parametrize("bits", [4, 3])
def test_the_packed_model_is_near_the_exported_one(run: Run, bits: int) -> None:
    """All seven linears of each layer are packed, and stand for weights near those before; the rest is as it was."""
    full, quantized = run.model(), run.model(f"model-awq-{bits}bit")
    packed = {name: part for name, part in quantized.named_modules() if isinstance(part, QuantizedLinear)}
    assert len(packed) == 7 * (3 if run.method == "static" else 6)
    assert {part.bits for part in packed.values()} == {bits}
    before = dict(full.named_parameters())
    for name, weight in quantized.named_parameters():
        if "norm" not in name or ".router." in name:  # AWQ folds its scales into the layers' norms
            assert torch.equal(weight, before[name]), name
    # Weights near their initialisation lose a quarter at 4 bits and a half at 3; a wrong order of codes, scales or zero
    # points anywhere would give logits as far away as others' are (1.4).
    exact, rounded = logits(full, 0.0), logits(quantized, 0.0)
    assert (rounded - exact).norm() < {4: 0.4, 3: 0.7}[bits] * exact.norm()
    assert not torch.equal(rounded, exact)
    assert run.directory.weight_bytes(bits) < 0.5 * run.directory.weight_bytes()


@qtale
def test_other_engines_and_precisions_stand_beside(run: Run, tmp_path: Path) -> None:
    run = replace(run, root=shutil.copytree(run.root, tmp_path / "run"))
    main(["quantize", str(run.root), "--quantize.engine", "rtn", "--quantize.bits", "[4]"])
    main(["quantize", str(run.root), "--quantize.bits", "[3.5]"])
    widths = {
        part.bits for part in run.model("model-awq-3.5bit").modules() if isinstance(part, QuantizedLinear)
    }
    assert len(widths) > 1
    before = run.results()["selected"]
    main(["thresholds", str(run.root), "--quantize.engine", "rtn", "--quantize.bits", "[4]"])
    rows = {(row["engine"], row["bits"]) for row in run.results()["evaluation"]}
    assert rows == {("none", 16), ("native", 4), ("native", 3), ("rtn", 4)}
    assert [row for row in run.results()["selected"] if row["engine"] != "rtn"] == before


@qtale
def test_quantizing_a_quantized_model_is_refused(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = replace(run, root=shutil.copytree(run.root, tmp_path / "run"))
    shutil.rmtree(run.root / "model")
    shutil.copytree(run.root / "model-awq-4bit", run.root / "model")
    (run.root / "manifest.json").unlink()  # else it is said first that this isn't what the run wrote
    with pytest.raises(SystemExit):
        main(["quantize", str(run.root), "--quantize.bits", "[2]"])
    assert "is quantized already" in " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------------- stages on a finished run


def test_the_newest_checkpoint_is_kept_behind_the_last_validation(
    options: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Nine steps, validated behind the fourth and the eighth: the best is one of these, the last the ninth."""
    more = (*SMALL, "--trainer.max_steps", "9", "--quantize.bits", "[]", "--out", str(tmp_path))
    main(["fit", *options("tiny", "full", *more)])
    run = Run("full", tmp_path / "tiny-full-facts-s0", [])
    assert run.checkpoint("best")["global_step"] in (4, 8)
    assert run.checkpoint("last")["global_step"] == 9


def test_a_terminated_run_ends_with_an_error_and_resumes(
    options: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["fit", *options("tiny", "full", *SMALL, "--quantize.bits", "[]", "--out", str(tmp_path))]
    step = QTALEModule.training_step

    def terminated(module: QTALEModule, batch: Any, batch_idx: int) -> Any:
        if module.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(QTALEModule, "training_step", terminated)
        with pytest.raises(SystemExit) as end:
            main(command)
    assert end.value.code == 128 + signal.SIGTERM
    run = Run("full", tmp_path / "tiny-full-facts-s0", command)
    assert 3 <= run.checkpoint("last")["global_step"] < 8
    assert not (run.root / "model").exists()
    main(command)
    assert run.checkpoint("last")["global_step"] == 8
    assert run.results()["train"]["steps"] == 8
    assert run.results()["selected"]


@each_method
def test_starting_again_repeats_nothing(run: Run) -> None:
    times, before = written(run.root), run.results()
    main(run.command)
    after = run.results()
    assert written(run.root) == times
    for section in ("train", "routing", "evaluation", "selected"):  # rows with their measured seconds
        assert after.get(section) == before.get(section)


@qtale
def test_a_sweep_adds_the_thresholds_that_are_missing(run: Run) -> None:
    before = run.results()["evaluation"]
    main(["thresholds", str(run.root), "--sweep.thresholds", "[0.5,0.25,0.1]"])
    after = run.results()["evaluation"]
    assert [row for row in after if row["theta"] != 0.25] == [row for row in before if row["theta"] != 0.25]
    splits = ("validation", "calibration")
    assert grid(after) - grid(before) == {(bits, 0.25, split) for bits in (16, 4, 3) for split in splits}


@qtale
def test_evaluate_adds_one_row(run: Run) -> None:
    before = run.results()["evaluation"]
    main(["evaluate", str(run.root), "--bits", "4", "--theta", "0.3"])
    after = run.results()["evaluation"]
    assert grid(after) - grid(before) == {(4, 0.3, "validation")}
    assert [row for row in after if row["theta"] != 0.3] == before


@qtale
def test_evaluates_default_is_the_models_own_threshold(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """θ = 0.5 at 16 bits, which the sweep has measured already: what was measured is said again."""
    before = run.results()
    main(["evaluate", str(run.root)])
    assert run.results() == before
    said = capsys.readouterr()
    assert "16 bits, θ = 0.5: accuracy" in said.out + said.err
    assert "measured before" in " ".join((said.out + said.err).split())


@pytest.mark.parametrize("run", ["full"], indirect=True)
def test_a_model_without_routers_takes_no_threshold(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(run.root), "--theta", "0.3"])
    assert end.value.code == 2
    assert "leave --theta out" in " ".join(capsys.readouterr().err.split())


@qtale
def test_report_writes_everything_from_the_results(run: Run) -> None:
    made = [run.root / "results.md", run.root / "metrics.csv", *(run.root / "plots").glob("*.png")]
    before, results = run.results(), (run.root / "results.json").read_bytes()
    for file in made:
        file.unlink()
    main(["report", str(run.root)])
    assert all(file.is_file() for file in made)
    assert run.results() == before
    assert (run.root / "results.json").read_bytes() == results


@qtale
def test_quantize_adds_the_bits_that_are_missing(run: Run) -> None:
    times = written(run.root)
    main(["quantize", str(run.root), "--quantize.bits", "[4,3,2]"])
    after = written(run.root)
    assert {file: time for file, time in after.items() if file in times} == times
    assert (run.root / "awq-search-2bit.safetensors").is_file()
    assert run.model("model-awq-2bit").model.layers[0].self_attn.q_proj.bits == 2


@qtale
def test_results_are_plain_json(run: Run) -> None:
    """No NaN or Infinity, which other readers refuse."""

    def refuse(name: str) -> None:
        pytest.fail(f"{name} in results.json")

    json.loads((run.root / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)
