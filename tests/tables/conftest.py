"""Runs that take no time: what the commands would leave in a run's folder, made up from what they are asked."""

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from qtale_lightning.cli import QTALECLI
from qtale_lightning.digests import of_model, of_split
from qtale_lightning.launching import Job, Local
from qtale_lightning.models.families import routed_config
from qtale_lightning.models.sources import base_config, load_tokenizer
from qtale_lightning.quantization.options import QuantizationOptions
from qtale_lightning.results.fingerprints import FORMAT, Fingerprint, fingerprint, made
from qtale_lightning.results.origin import origin
from qtale_lightning.results.predictions import Prediction, save_predictions
from qtale_lightning.results.schema import Evaluation
from qtale_lightning.results.store import load_or_new, save_results, upsert_evaluation
from qtale_lightning.routing import METHODS
from qtale_lightning.run import RunDirectory

ROOT = Path(__file__).parent.parent.parent
QUESTIONS = 120
OPTIONS = ["--trainer.max_steps", "4", "--sweep.thresholds", "[0.5,0.1]", "--wandb", "disabled"]
LAYERS = 6
ROWS = {split: {"all": "of them"} for split in ("train", "calibration", "validation")}
TEXTS = {"alpaca": "perplexity", "samsum": "rougeL"}


class FakeCommands:
    """Stands in for the processes: notes each command, and leaves its results without a model.

    Attributes:
        started: The command lines, in order.
        fails: Words of a command line that ends with status 1.
        stops: How many commands are done before the next one is interrupted.
        advantage: Accuracy of each method above 0.4.
    """

    def __init__(self) -> None:
        self.started: list[list[str]] = []
        self.fails: tuple[str, ...] = ()
        self.stops: int | None = None
        self.advantage = {
            "full": 0.3,
            "static": 0.2,
            "qtale": 0.1,
            "qtale-plus": 0.15,
            "mod": 0.05,
            "dllm": 0.0,
            "random": -0.1,
        }

    at_once = 1

    def run(self, jobs: Sequence[Job]) -> None:
        Local(start=self).run(jobs)

    def __call__(self, arguments: Sequence[str], log: Path | None, lock: int | None) -> int:
        if self.stops is not None and len(self.started) >= self.stops:
            raise KeyboardInterrupt
        self.started.append(list(arguments))
        if self.fails and all(word in arguments for word in self.fails):
            assert log is not None
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("some lines\nerror: it isn't there\n", encoding="utf-8")
            return 1
        getattr(self, f"_{arguments[0]}")(list(arguments[1:]))
        return 0

    def kinds(self) -> list[str]:
        return [arguments[0] for arguments in self.started]

    def _fit(self, options: list[str]) -> None:
        cli = QTALECLI(options, "fit")
        run = cli.run
        made_from: Any = origin(yaml.safe_load(cli.config_text())) | {"rows": ROWS}
        run.claim(cli.config_text(), made_from)
        results = load_or_new(run.root)
        results["run"] = {
            "model": cli.model.name,
            "method": cli.model.method,
            "data": cli.datamodule.label,
            "seed": cli.model.seed,
            "made_from": made_from,
            "git": {"commit": "0123456789", "dirty": False},
            "versions": {},
            "hardware": "a machine",
            "command": "python -m qtale_lightning fit",
        }
        results["train"] = {
            "steps": 4, "examples": 8, "tokens": 100, "seconds": 2.0, "tokens_per_second": 50.0,
            "trainable_parameters": 10, "final_losses": {"ce": 1.0},
        }  # fmt: skip
        if METHODS[cli.model.method].routers:
            counts = [1, 2, 8, 4]
            histograms = {"logit_gap": {"edges": [-2.0, -1.0, 0.0, 1.0, 2.0], "counts": counts}}
            ratios = [0.6] * LAYERS
            results["routing"] = {
                "flip_ratio": 0.2, "logit_gap": 1.0, "entropy": 0.5, "execution_ratio_per_layer": ratios,
                "histograms": histograms,
            }  # fmt: skip
        save_results(run.root, results)
        run.model().mkdir(exist_ok=True)
        config = {
            "num_hidden_layers": LAYERS, "num_key_value_heads": 2, "head_dim": 32, "start_layer": 2,
            "router_width": 32 if METHODS[cli.model.method].decides else None, "method": cli.model.method,
        }  # fmt: skip
        if (cli.model.name, cli.model.method) == ("tiny", "full"):  # other runs may begin with it
            whole = routed_config(base_config("tiny"), start_layer=LAYERS, method="full")
            whole.save_pretrained(run.model())
            load_tokenizer("tiny").save_pretrained(run.model())
        else:
            (run.model() / "config.json").write_text(json.dumps(config))
        (run.root / "metrics.csv").write_text("step,train/flip_ratio\n1,0.3\n2,\n3,0.2\n")
        (run.root / "results.md").write_text("done")
        quantization = cli.quantization
        self._make(run, quantization)
        self._grid(run, quantization.bits, quantization.engine, cli.sweep.grid())

    def _quantize(self, options: list[str]) -> None:
        names = [option.name for option in fields(QuantizationOptions)]
        asked = {name: _value(options, name) for name in names if f"--quantize.{name}" in options}
        self._make(RunDirectory(options[0]), QuantizationOptions(**asked))

    def _make(self, run: RunDirectory, options: QuantizationOptions) -> None:
        calibration = {"digest": "of them", "sequences": options.sequences, "all": False}
        began = {"format": FORMAT, "model": of_model(run.model()), "calibration": calibration}
        for width in options.bits:
            folder = run.model(width, options.engine)
            folder.mkdir(exist_ok=True)
            made_from = began | options.settings(width)
            (folder / "config.json").write_text(json.dumps({"quantization_config": {"made_from": made_from}}))

    def _thresholds(self, options: list[str]) -> None:
        run, rule = RunDirectory(options[0]), _value(options, "rule")
        bits, engine = _value(options, "bits"), _value(options, "engine")
        for width in bits:
            assert run.model(width, engine).is_dir(), "a precision is swept before it is there"
        perturbation = _perturbation(options)
        if rule == "one-standard-error":
            assert not perturbation
            self._grid(run, bits, engine, _value(options, "thresholds"))
            return
        for width in (16, *bits):
            for budget in _value(options, "budgets"):
                quantizer = "none" if width == 16 else engine
                theta = round(1 - budget, 6)
                self._row(run, width, quantizer, theta, "validation", perturbation)
                results = load_or_new(run.root)
                search: Any = {
                    "bits": width, "engine": quantizer, "rule": rule, "budget": budget, "theta": theta,
                    "execution_ratio": budget, "passes": 3, "seconds": 1.0,
                    "fingerprint": self._fingerprint(run, width, quantizer, perturbation),
                }  # fmt: skip
                if perturbation:
                    search["perturbation"] = perturbation
                results["searches"] = [*results.get("searches", []), search]
                save_results(run.root, results)

    def _evaluate(self, options: list[str]) -> None:
        asked = ("--bits", "--theta", "--quantize.engine", "--bits_schedule")
        at = {name: options[options.index(name) + 1] for name in asked if name in options}
        bits, theta = float(at["--bits"]), float(at["--theta"]) if "--theta" in at else None
        engine, schedule = "none" if bits == 16 else at["--quantize.engine"], at.get("--bits_schedule", "")
        self._row(
            RunDirectory(options[0]), bits, engine, theta, "validation", _perturbation(options), schedule
        )

    def _grid(self, run: RunDirectory, bits: Sequence[float], engine: str, grid: Sequence[float]) -> None:
        has_theta = METHODS[self._configuration(run)["model"]["method"]].theta
        for width in (16, *bits):
            for theta in grid if has_theta else [None]:
                for split in ("calibration", "validation") if has_theta else ("validation",):
                    self._row(run, width, "none" if width == 16 else engine, theta, split)

    @staticmethod
    def _fingerprint(
        run: RunDirectory, bits: float, engine: str, perturbation: dict[str, float]
    ) -> Fingerprint:
        model, made_from = of_model(run.model(bits, engine)), made(run.quantization_config(bits, engine))
        return fingerprint(model, made_from, of_split(ROWS["validation"]), perturbation)

    @staticmethod
    def _configuration(run: RunDirectory) -> dict[str, Any]:
        return yaml.safe_load(run.config.read_text(encoding="utf-8"))

    def _row(
        self,
        run: RunDirectory,
        bits: float,
        engine: str,
        theta: float | None,
        split: str,
        perturbation: dict[str, float] | None = None,
        schedule: str = "",
    ) -> None:
        """Accuracy falls with the bits, with θ and with noise; every second question that is right differs by seed."""
        perturbation = perturbation or {}
        config = self._configuration(run)
        method, seed = config["model"]["method"], config["seed_everything"]
        share = 0.4 + self.advantage[method] - 0.1 * (theta or 0) - (0.05 if bits < 4 else 0)
        share -= 0.05 * perturbation.get("noise", 0)
        task = config["data"]["tasks"]
        right = np.random.default_rng(seed).permutation(QUESTIONS) < share * QUESTIONS
        ratio = 1.0 if method == "full" else config["model"]["target_ratio"] if theta is None else 1 - theta
        value, error = float(right.mean()), 0.04
        row: Any = {
            "bits": int(bits) if bits == int(bits) else bits,
            "engine": "+".join(part for part in (engine, schedule) if part),
            "theta": theta,
            "split": split,
            "examples": QUESTIONS,
            "execution_ratio": ratio,
            "execution_ratio_per_layer": [1.0, 1.0] + [ratio if METHODS[method].decides else 1.0] * (LAYERS - 2),
            "flops_ratio": ratio,
            "accuracy": {task: _score(task, value, error)},
            "average": value if task not in TEXTS else None,
            "average_stderr": error if task not in TEXTS else None,
            "average_nll": 3 - value,
            "average_nll_stderr": 0.05,
            "weight_bytes": int(1_000_000 * bits),
            "seconds": 1.5,
            "protocol": {"seed": seed, "prompt_style": "cloze"}
            | ({"perturbation": perturbation} if perturbation else {}),
            "fingerprint": self._fingerprint(run, bits, engine, perturbation),
        }  # fmt: skip
        outcomes = [
            Prediction(task, i, 0, (-1.0, -2.0), {"value": float(r), "nll": 3.0 - r, "acc": r, "acc_norm": r})
            for i, r in enumerate(right.astype(float))
        ]
        evaluation: Evaluation = row
        save_predictions(run.root, evaluation, outcomes)
        upsert_evaluation(run.root, evaluation)


def _perturbation(options: Sequence[str]) -> dict[str, float]:
    given = [name for name in ("noise", "random_gates", "random_ratio", "draw") if f"--{name}" in options]
    return {name: float(options[options.index(f"--{name}") + 1]) for name in given}


def _value(options: Sequence[str], name: str) -> Any:
    """An option of a stage, such as `--quantize.bits` by "bits"."""
    (at,) = (index for index, option in enumerate(options) if option.endswith(f".{name}"))
    return yaml.safe_load(options[at + 1])


def _score(task: str, value: float, error: float) -> dict[str, Any]:
    """A task's, by the metric that it reports."""
    both: dict[str, Any] = {"value": value, "stderr": error, "nll": 3 - value, "examples": QUESTIONS}
    if task not in TEXTS:
        return both | {"metric": "acc", "acc": value, "acc_norm": value}
    texts = {
        "metric": TEXTS[task],
        "nll_stderr": 0.1,
        "perplexity": 9.0,
        "perplexity_stderr": 0.5,
        "tokens": 500,
    }
    rouge = {
        name: at for k in ("rouge1", "rouge2", "rougeL") for name, at in ((k, value), (f"{k}_stderr", error))
    }
    return both | texts | (rouge if task == "samsum" else {})


@pytest.fixture
def commands() -> FakeCommands:
    return FakeCommands()


Make = Callable[..., Path]


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A table's command line at its smallest, in a folder of the test's own."""
    monkeypatch.chdir(ROOT)

    def given(name: str, *more: str) -> list[str]:
        return [name, "--model", "tiny", "--out", str(tmp_path / "out"), *OPTIONS, *more]

    return given


@pytest.fixture
def declared(tmp_path: Path) -> Callable[[str], Path]:
    """A declaration's file with this text."""

    def write(text: str) -> Path:
        file = tmp_path / "mine.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return write
