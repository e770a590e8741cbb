"""The paper's setting: complete, the same on one GPU and on several, and what its files say runs, with a tiny model."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qtale_lightning.__main__ import main
from qtale_lightning.cli import QTALECLI
from qtale_lightning.results.store import load_results
from qtale_lightning.routing import METHODS

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
PRESETS = sorted(file.stem for file in (EXPERIMENTS / "paper").glob("*.yaml"))
DEVICES = sorted(file.stem for file in (EXPERIMENTS / "devices").glob("*.yaml"))

# Tools for training that the paper doesn't have, each off unless it is asked for.
TOOLS = {
    *("ratio_ascent", "distillation", "teacher", "stages", "noise_bits", "noise_schedule", "keep_kv"),
    *("stand_in_rank", "gates"),
}

# What a tiny model on a CPU needs otherwise, and no more.
TINY = (
    *(
        "--model.name",
        "tiny",
        "--data.tasks",
        "facts",
        "--quantize.group_size",
        "32",
        "--quantize.sequences",
        "16",
    ),
    *("--data.limit_train", "64", "--data.limit_validation", "4", "--data.calibration_rows", "8"),
    *(
        "--trainer.max_steps",
        "2",
        "--validations",
        "1",
        "--trainer.accelerator",
        "cpu",
        "--wandb",
        "disabled",
    ),
)


def files(preset: str, method: str = "qtale", devices: str | None = None) -> list[str]:
    """As `make … PRESET= DEVICES= METHOD=` gives them."""
    layout = [f"devices/{devices}"] if devices else []
    names = [f"paper/{preset}", *layout, f"methods/{method}"]
    return [part for name in names for part in ("--config", str(EXPERIMENTS / f"{name}.yaml"))]


@pytest.mark.parametrize("devices", [None, *DEVICES])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_papers_setting_whatever_the_devices(preset: str, devices: str | None) -> None:
    """The paper's and D-LLM's values; the effective batch is D-LLM's on any number of devices."""
    cli = QTALECLI(files(preset, devices=devices), "fit")
    cli.check()
    assert cli.model.name == preset
    accumulate = cli.config["trainer"]["accumulate_grad_batches"]
    assert cli.datamodule.batch_size * accumulate * cli.devices == 8
    assert cli.devices == (8 if devices else 1)
    assert cli.config["trainer"]["strategy"] == (devices or "auto")
    assert cli.model.lr == pytest.approx(9e-3 * 8 / 256)
    assert (cli.config["trainer"]["max_epochs"], cli.model.warmup) == (10, 0.2)
    assert (cli.model.lambdas["ratio"], cli.model.target_ratio, cli.model.temperature) == (5.0, 0.5, 1.0)
    assert cli.model.lora_options["rank"] == 8
    assert cli.quantization.bits == (4, 3)
    assert cli.quantization.group_size == 128
    assert cli.datamodule.label == "csqa"
    assert cli.datamodule.max_length == 1024


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_everything(preset: str) -> None:
    """No default of the code can change what the paper's setting is, and every value ours or theirs is marked."""
    text = (EXPERIMENTS / f"paper/{preset}.yaml").read_text(encoding="utf-8")
    given: dict[str, Any] = yaml.safe_load(text)
    cli = QTALECLI(files(preset), "fit")
    resolved = yaml.safe_load(cli.config_text())
    free = {
        "model": {"path", "revision", "train_all", "router_lr", "lambda_prediction"} | TOOLS,
        "quantize": {"symmetric", "patterns"},
    }
    for section in ("model", "quantize"):
        assert resolved[section].keys() - given[section].keys() <= free[section] | {"seed"}
    assert "# λ2, ours" in text


def test_both_models_have_one_setting() -> None:
    llama2, llama3 = (
        yaml.safe_load((EXPERIMENTS / f"paper/{preset}.yaml").read_text(encoding="utf-8"))
        for preset in PRESETS
    )
    llama3["model"]["name"] = llama2["model"]["name"]
    assert llama2 == llama3


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", PRESETS)
def test_plans_need_no_weights(preset: str, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", *files(preset, method, "ddp")])
    shown = " ".join(capsys.readouterr().out.split())
    assert "8 on 8 device(s)" in shown
    assert f"{preset}, {method}, csqa" in shown


@pytest.mark.slow
def test_the_same_files_run_a_tiny_model(tmp_path: Path) -> None:
    """One of the presets: they differ in the model's name only, which is another one here."""
    preset = PRESETS[0]
    main(["fit", *files(preset), *TINY, "--out", str(tmp_path)])
    results = load_results(tmp_path / "tiny-qtale-facts-s0")
    assert results["train"]["examples"] == 16
    assert {row["bits"] for row in results["selected"]} == {16, 4, 3}


@pytest.mark.slow
def test_sharded_over_two_processes(tmp_path: Path) -> None:
    """fsdp: bfloat16 base, float32 LoRA and routers; then everything after training, on one of them."""
    more = ("--trainer.devices", "2", "--trainer.accumulate_grad_batches", "4", "--quantize.bits", "[]")
    options = [*files("llama3.1-8b", devices="fsdp"), *TINY, *more, "--out", str(tmp_path)]
    command = [sys.executable, "-m", "qtale_lightning", "fit", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "tiny-qtale-facts-s0"
    results = load_results(run)
    assert results["train"]["examples"] == 16
    assert results["selected"][0]["bits"] == 16
    # A checkpoint is the same as any other strategy's: whole float32 weights, those that were trained.
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert sum(value.numel() for value in saved.values()) == results["train"]["trainable_parameters"]
