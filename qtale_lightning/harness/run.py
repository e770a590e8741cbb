"""A finished run evaluated by lm-evaluation-harness, and what is kept of it: ``<run>/lm_eval.json``."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NotRequired, TypedDict

import torch
import transformers

from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.digests import of, of_model
from qtale_lightning.harness.backend import (
    SOFTMAX_DTYPE,
    evaluate_tasks,
    find_tasks,
    harness_model,
    harness_version,
    table,
)
from qtale_lightning.harness.tasks import LOCAL, is_local, local_prompts, write_tasks
from qtale_lightning.manifest import DamagedFileError, read_object, writing
from qtale_lightning.quantization.engines import DEFAULT
from qtale_lightning.report.notes import theta_text
from qtale_lightning.results.fingerprints import FORMAT, comparable, made
from qtale_lightning.run import RunDirectory
from qtale_lightning.stages import load_exported
from qtale_lightning.stages.loading import load_tokenizer
from qtale_lightning.stages.progress import console
from qtale_lightning.tasks import SUITES

SCHEMA = 1

# What is kept of the harness's answer: all that its table shows.
_KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples")


class Evaluation(TypedDict):
    """One call of the harness. All but ``results`` and ``seconds`` tells it from others.

    Attributes:
        bits, engine, theta: As in ``results.json``.
        tasks: As the harness names them; local rows end in ``_local``.
        protocol: The harness's version, and all that a score depends on besides.
        results: The harness's, as it calls them: ``results``, ``versions``, ``n-shot``, …; and the ``datasets`` that
            it read, by task: id, configuration, and the commit, since the harness pins none.
        fingerprint: As of `results.json`, without the protocol, which stands beside it; its questions are the local
            rows as they were asked, the harness's own aren't known by it. Older evaluations have none, and are made
            again.
        seconds: Measured, with the reading of rows.
    """

    bits: float
    engine: str
    theta: float | list[float] | None
    tasks: list[str]
    protocol: dict[str, Any]
    fingerprint: NotRequired[dict[str, Any]]
    results: dict[str, Any]
    seconds: float


def lm_eval(
    run: RunDirectory,
    data: CommonsenseDataModule,
    tasks: Sequence[str],
    bits: float = 16,
    engine: str = DEFAULT,
    theta: float | None = None,
    limit: int | None = None,
    batch_size: int | str | None = None,
) -> Evaluation:
    """Evaluate a run by the harness, print its table and keep the figures; what is there already is printed again.

    Args:
        run: With an exported model.
        data: Says where rows are, and how they are asked: a task whose rows are local (`is_local`) becomes task files
            with this suite's prompts, any other name is the harness's own task, from the hub. What is too long is cut
            where the model ends, not at --data.max_length.
        tasks: Names of this suite's tasks or suites, or of the harness's tasks, groups or tags.
        bits, engine: Which of the run's models.
        theta: Threshold; None is the model's own.
        limit: Questions of each task, the first ones; None takes all.
        batch_size: See `harness_model`; None is 8 on a CPU, where large batches leave its caches, else "auto".

    Raises:
        HarnessUnavailableError: The harness isn't installed.
        FileNotFoundError, ConnectionError, ValueError: Rows, a task or the model isn't there, or θ doesn't fit.
    """
    harness_version()
    if batch_size is None:
        batch_size = "auto" if torch.cuda.is_available() else 8
    tasks = [task for name in tasks for task in SUITES.get(name.strip(), (name.strip(),))]
    with TemporaryDirectory(prefix="qtale-lm-eval-") as temporary:
        local = [task for task in tasks if is_local(data, task)]
        prompts = {task: local_prompts(data, task) for task in local}
        write_tasks(Path(temporary), prompts)
        names = [f"{task}{LOCAL}" if task in local else task for task in tasks]
        manager = find_tasks(names, Path(temporary), defaults=len(local) < len(names))
        model = load_exported(run, bits, engine)
        if theta is not None:
            if not model.config.has_theta:
                raise ValueError(
                    f"{run.root} has no θ, by its method {model.config.method}: leave --theta out"
                )
            model.config.threshold = theta
        lm = harness_model(model, load_tokenizer(run, run.model(bits, engine)), batch_size)
        row: Evaluation = {
            "bits": bits,
            "engine": "none" if bits == 16 else engine,
            "theta": model.config.threshold if model.config.has_theta else None,
            "tasks": names,
            "protocol": {
                "harness": f"lm-eval {harness_version()}",
                "backend": "hf",
                "transformers": transformers.__version__,
                "dtype": str(model.dtype).removeprefix("torch."),
                "softmax_dtype": SOFTMAX_DTYPE,
                "max_length": lm.max_length,
                "batch_size": batch_size,
                "limit": limit,
                **(_local_protocol(data, local) if local else {}),
            },
            "fingerprint": {
                "format": FORMAT,
                "model": of_model(run.model(bits, engine)),
                "quantization": made(run.quantization_config(bits, engine)),
                "questions": of(
                    {task: [vars(prompt) for prompt in asked] for task, asked in prompts.items()}
                ),
            },
            "results": {},
            "seconds": 0.0,
        }
        known = [kept for kept in load_evaluations(run.root) if _same(kept, row)]
        if known:
            row = known[0]
        else:
            started = time.perf_counter()
            found = evaluate_tasks(lm, names, manager, limit)
            row["seconds"] = time.perf_counter() - started
            row["results"] = {key: found[key] for key in _KEPT if key in found}
            row["results"]["datasets"] = {
                name: [config.get("dataset_path"), config.get("dataset_name"), found["commits"].get(name)]
                for name, config in found["configs"].items()
            }
            save_evaluation(run.root, row)
    theta_said = "" if row["theta"] is None else f", θ = {theta_text(row['theta'])}"
    console.print(f"{bits:g} bits{theta_said}, {row['protocol']['harness']}, {row['seconds']:.0f} s")
    print(table(row["results"]))
    return row


def _local_protocol(data: CommonsenseDataModule, local: Sequence[str]) -> dict[str, Any]:
    """How local rows are chosen and asked."""
    asking = data.asking
    return {
        "prompt_style": asking.prompt_style,
        "choice_labels": asking.choice_labels,
        "shots": asking.shots,
        "root": data.root or "built-in",
        "seed": data.seed,
        "limit_validation": data.limit_validation,
    }


def load_evaluations(root: Path) -> list[Evaluation]:
    """The evaluations in a run's ``lm_eval.json``; none without the file.

    Raises:
        DamagedFileError: The file isn't what the run wrote, or has another schema.
    """
    path = root / "lm_eval.json"
    if not path.is_file():
        return []
    content = read_object(root, path, "remove it, and what is asked for is evaluated again", ["evaluations"])
    if content.get("schema") != SCHEMA:
        raise DamagedFileError(f"{path} has schema {content.get('schema')}, not {SCHEMA}: move it away")
    return list(content["evaluations"])


def save_evaluation(root: Path, row: Evaluation) -> None:
    """Add an evaluation to ``lm_eval.json``, in the place of one of the same model and protocol."""
    rows = [kept for kept in load_evaluations(root) if not _same(kept, row)]
    content = {"schema": SCHEMA, "evaluations": [*rows, row]}
    with writing(root, root / "lm_eval.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _same(one: Evaluation, other: Evaluation) -> bool:
    """Whether two are of one model, questions and protocol, wherever the rows lay."""
    told = ("bits", "engine", "theta", "tasks", "fingerprint")
    alike = all(one.get(key) == other.get(key) for key in told)
    return alike and _asked(one) == _asked(other)


def _asked(row: Evaluation) -> dict[str, Any]:
    """The protocol; of the harness's own rows, which no digest tells, with what says how they were chosen."""
    own = all(task.endswith(LOCAL) for task in row["tasks"])
    return comparable(row["protocol"]) if own else row["protocol"]
