"""Two realistic runs: a routed one swept over θ at three precisions, and a full one without routers."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from qtale_lightning.results.schema import Evaluation, Results

TASKS = {
    "piqa": 1838,
    "boolq": 3270,
    "social_iqa": 1954,
    "arc_easy": 570,
    "arc_challenge": 299,
    "winogrande": 1267,
    "openbookqa": 500,
}
LAYERS = 30
THETAS = [0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]


def make_row(bits: int, theta: float | None, average: float, **changes: Any) -> Evaluation:
    """A validation row whose tasks' accuracies lie around `average` and average to it."""
    spread = np.linspace(-0.1, 0.1, len(TASKS))
    values = dict(zip(TASKS, average + spread, strict=True))
    errors = {task: math.sqrt(values[task] * (1 - values[task]) / count) for task, count in TASKS.items()}
    ratio = 1.0 if theta is None else 1 - 0.9 * theta**1.2
    depth = np.linspace(0, 1, LAYERS)
    per_layer = np.clip(ratio + (1 - ratio) * 0.9 * np.cos(6 * depth) ** 3, 0, 1)
    row: Evaluation = {
        "bits": bits,
        "engine": "none" if bits == 16 else "native",
        "theta": theta,
        "split": "validation",
        "examples": sum(TASKS.values()),
        "execution_ratio": ratio,
        "flops_ratio": ratio + (0 if theta is None else 0.012),
        "accuracy": {
            task: {
                "value": float(values[task]),
                "stderr": errors[task],
                "metric": "acc" if task in ("boolq", "winogrande", "social_iqa") else "acc_norm",
                "nll": 1.3,
                "acc": float(values[task]),
                "acc_norm": float(values[task]),
                "examples": count,
            }
            for task, count in TASKS.items()
        },
        "average": average,
        "average_stderr": math.sqrt(sum(error**2 for error in errors.values())) / len(TASKS),
        "average_nll": 1.9 - average,
        "average_nll_stderr": 0.008,
        "execution_ratio_per_layer": per_layer.tolist(),
        "weight_bytes": 269_000_000 * bits // 16,
        "seconds": 40 + 60 * ratio,
        "protocol": {"prompt_style": "cloze", "bos": True, "batch_size": 32, "dtype": "float32"},
    }
    return {**row, **changes}  # type: ignore[typeddict-item]


def _run(method: str) -> Results:
    return {
        "schema": 1,
        "run": {
            "model": "smollm2-135m",
            "method": method,
            "data": "csqa",
            "seed": 0,
            "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
            "versions": {"python": "3.11.9", "torch": "2.13.0"},
            "hardware": "AMD EPYC 7763, 8 cores; no GPU",
            "command": f"make train MODEL=smollm2-135m METHOD={method} DATA=csqa",
        },
        "train": {
            "steps": 1500,
            "examples": 24000,
            "tokens": 1_987_654,
            "seconds": 3605.5,
            "tokens_per_second": 551.3,
            "trainable_parameters": 9_876_543,
            "final_losses": {"ce": 0.8123, "ratio": 0.0213, "entropy": -0.4021, "total": 0.8787},
        },
        "evaluation": [],
        "selected": [],
    }


@pytest.fixture
def row() -> Callable[..., Evaluation]:
    return make_row


@pytest.fixture
def qtale() -> Results:
    """Three precisions × eight θ; quantization hurts more where fewer layers execute."""
    results = _run("qtale")
    loss, chosen = {16: 0.0, 4: 0.012, 3: 0.05}, {16: 0.5, 4: 0.4, 3: 0.2}
    results["routing"] = {
        "flip_ratio": 0.0834,
        "logit_gap": 1.21,
        "entropy": 0.41,
        "execution_ratio_per_layer": make_row(16, 0.55, 0.5)["execution_ratio_per_layer"],
    }
    for bits in (16, 4, 3):
        for theta in THETAS:
            average = 0.58 - 0.06 * theta**3 - loss[bits] * (0.5 + theta)
            results["evaluation"].append(make_row(bits, theta, average))
            if theta == chosen[bits]:
                row = results["evaluation"][-1]
                results["selected"].append(
                    {
                        "bits": bits,
                        "theta": theta,
                        "rule": "lowest execution ratio within one standard error of the best on calibration",
                        "average": row["average"],
                        "average_stderr": row["average_stderr"],
                        "average_nll": row["average_nll"],
                        "execution_ratio": row["execution_ratio"],
                    }
                )
    return results


@pytest.fixture
def full() -> Results:
    """No routers: one row per precision, nothing to select."""
    results = _run("full")
    averages = {16: 0.585, 4: 0.571, 3: 0.528}
    results["evaluation"] = [make_row(bits, None, average) for bits, average in averages.items()]
    return results


@pytest.fixture
def metrics_csv(tmp_path: Path) -> Path:
    """As CSVLogger writes it: training and validation values in rows of their own."""
    generator = np.random.default_rng(0)
    steps = np.arange(4, 1500, 5)
    decay = np.exp(-steps / 300)
    noise = generator.normal(size=(4, len(steps)))
    train = pd.DataFrame(
        {
            "step": steps,
            "train/loss": 0.8 + 3 * decay + 0.15 * noise[0],
            "train/ce": 0.8 + decay + 0.1 * noise[1],
            "train/ratio_loss": 0.02 + 0.4 * decay,
            "train/entropy_loss": -0.4 + 0.1 * decay,
            "train/execution_ratio": 0.5 + 0.45 * decay + 0.01 * noise[2],
            "train/target_ratio": 0.5,
            "train/flip_ratio": 0.08 + 0.04 * decay + 0.004 * noise[3],
            "train/logit_gap": 1.2 + 0.7 * decay,
        }
    )
    at = np.arange(149, 1500, 150)
    validation = pd.DataFrame(
        {
            "step": at,
            "val/loss": 0.95 + 3 * np.exp(-at / 300),
            "val/ce": 0.9 + np.exp(-at / 300),
            "val/execution_ratio": 0.5 + 0.45 * np.exp(-at / 300),
        }
    )
    path = tmp_path / "metrics.csv"
    pd.concat([train, validation]).sort_values("step", kind="stable").to_csv(path, index=False)
    return path
