"""Stages that train: `make train MODEL=tiny`, from fit to report."""

import json
from typing import Any

import torch

from gpu_check.stages import ROOT, Context, StageFailed
from qtale_lightning.__main__ import main

QUICK = (
    *("--trainer.max_steps", "4", "--validations", "1", "--data.limit_train", "64", "--data.batch_size", "8"),
    *("--data.limit_validation", "8", "--data.calibration_rows", "8", "--quantize.sequences", "32"),
    *("--quantize.bits", "[4]", "--sweep.thresholds", "[0.5]"),
)


def tiny(context: Context) -> dict[str, Any]:
    """All weights trained in float32."""
    return _fit(context)


def lora(context: Context) -> dict[str, Any]:
    """LoRA and routers in float32 on a frozen base in bfloat16, as larger models are trained."""
    return _fit(context, "--model.train_all", "false", "--trainer.precision", "bf16-mixed",
                "--trainer.max_steps", "60", "--quantize.bits", "[4]")  # fmt: skip


def _fit(context: Context, *options: str) -> dict[str, Any]:
    """A run's figures, and the most memory that tensors took.

    Raises:
        StageFailed: The run ended otherwise than with a report of what was trained on this device.
    """
    arguments = ["fit"]
    for config in ("base", "models/tiny", "methods/qtale"):
        arguments += ["--config", str(ROOT / "experiments" / f"{config}.yaml")]
    arguments += ["--data.tasks", "facts", "--seed_everything", "0", "--wandb", "disabled"]
    arguments += ["--trainer.accelerator", "gpu" if context.device == "cuda" else "cpu"]
    arguments += ["--out", str(context.work), *options, *(QUICK if context.quick else ())]
    try:
        main(arguments)
    except SystemExit as ended:
        if ended.code:
            raise StageFailed(f"`fit` ended with status {ended.code}") from ended
    run = context.work / "tiny-qtale-facts-s0"
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    figures = {key: results.get(key) for key in ("run", "train", "evaluation", "selected")}
    if context.device == "cuda":
        figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        if not figures["peak_memory_bytes"]:
            raise StageFailed("nothing was allocated on the GPU: the run was made on the CPU")
    missing = [name for name in ("model", "model-awq-4bit", "results.md") if not (run / name).exists()]
    if missing or not results["evaluation"]:
        raise StageFailed(f"the run has no {', '.join(missing) or 'evaluation'}")
    return figures
