"""What a model answered to each question, kept beside `results.json`: one JSON Lines file an evaluation row.

The first line names the row, so that nothing stale is taken for it; each other line is a question. With them two models
can be compared question by question long after both were evaluated.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from qtale_lightning.data.tokenization import EncodedPrompt
from qtale_lightning.digests import of
from qtale_lightning.evaluation.accuracy import ACCURACIES, accuracy_by_task
from qtale_lightning.evaluation.statistics import ByTask, Estimate, paired_difference_over_seeds
from qtale_lightning.manifest import DamagedFileError, verify, writing

FOLDER = "predictions"
KEY = ("bits", "engine", "theta", "split", "examples", "protocol", "fingerprint")
"""What of an evaluation row its file repeats; rows of before there were fingerprints have none."""
REMEDY = "remove the file, to score its row again"


@dataclass(frozen=True)
class Prediction:
    """One question's outcome.

    Attributes:
        task: That asked it.
        index: Its place in the split.
        label: The right choice.
        loglikelihoods: Summed, in nats, of each choice.
        scores: `nll`, and where the task reports an accuracy its part in that (`value`), in `acc` and in `acc_norm`.
    """

    task: str
    index: int
    label: int
    loglikelihoods: tuple[float, ...]
    scores: dict[str, float]


_LINE = TypeAdapter(Prediction)


def predictions(
    questions: Sequence[EncodedPrompt],
    loglikelihoods: Sequence[np.ndarray],
    metrics: Mapping[str, str],
    texts: Mapping[int, str] | None = None,
) -> list[Prediction]:
    """Outcomes by the definitions of :func:`~qtale_lightning.evaluation.accuracy.accuracy_by_task`, each alone."""
    outcomes = []
    for index, (question, values) in enumerate(zip(questions, loglikelihoods, strict=True)):
        text = {0: texts[index]} if texts and index in texts else None
        alone = accuracy_by_task([question], [values], metrics, text)[question.task]
        kept = ("value", "acc", "acc_norm", "nll") if alone["metric"] in ACCURACIES else ("nll",)
        scores = {key: float(alone[key]) for key in kept}
        outcomes.append(Prediction(question.task, index, question.label, tuple(values.tolist()), scores))
    return outcomes


def by_task(outcomes: Sequence[Prediction], score: str) -> ByTask:
    """One score of every question, by task.

    Raises:
        ValueError: A task hasn't that score.
    """
    values: dict[str, list[float]] = {}
    for outcome in outcomes:
        if score not in outcome.scores:
            raise ValueError(
                f"{outcome.task} reports no accuracy, so there is none to compare question by question"
            )
        values.setdefault(outcome.task, []).append(outcome.scores[score])
    return {task: np.array(found) for task, found in values.items()}


def compare_predictions(
    ours: Sequence[Prediction], theirs: Sequence[Prediction], score: str = "value"
) -> Estimate:
    """Difference ``ours − theirs`` of a score's average over tasks, paired by question.

    Raises:
        ValueError: They answer other questions, or haven't that score.
    """
    return compare_seeds([ours], [theirs], score)


def compare_seeds(
    ours: Sequence[Sequence[Prediction]], theirs: Sequence[Sequence[Prediction]], score: str = "value"
) -> Estimate:
    """:func:`compare_predictions` of two methods' models of several training seeds, pair by pair.

    Raises:
        ValueError: A pair, or two seeds, answer other questions, or haven't that score.
    """
    for one, other in (
        (a, b) for pair in zip(ours, theirs, strict=True) for a, b in zip(*pair, strict=False)
    ):
        if (one.task, one.index, one.label) != (other.task, other.index, other.label):
            raise ValueError(
                f"not the same questions: number {one.index} is of {one.task} with answer {one.label} here, "
                f"number {other.index} of {other.task} with answer {other.label} there"
            )
    scores = ([by_task(seed, score) for seed in side] for side in (ours, theirs))
    return paired_difference_over_seeds(*scores)


def predictions_file(run_dir: str | Path, row: Mapping[str, Any]) -> Path:
    """Where the predictions of an evaluation row lie: named by split, bits, engine, θ, and what was asked and how."""
    theta = row["theta"]
    if isinstance(theta, list):  # one a layer: too many for a name
        name = "layers-" + hashlib.sha256(json.dumps(theta).encode()).hexdigest()[:12]
    else:
        name = "dense" if theta is None else f"theta-{round(theta, 9)}"
    if found := row.get("fingerprint"):
        name += f"-{of([found['questions'], found['protocol']])[:8]}"
    return Path(run_dir) / FOLDER / f"{row['split']}-{row['bits']:g}bit-{row['engine']}-{name}.jsonl"


def save_predictions(run_dir: str | Path, row: Mapping[str, Any], outcomes: Sequence[Prediction]) -> Path:
    """Writes the predictions of an evaluation row atomically, and returns their file."""
    path = predictions_file(run_dir, row)
    lines = [_key(row), *map(asdict, outcomes)]
    with writing(Path(run_dir), path) as temporary:
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        temporary.write_text(text, encoding="utf-8")
    return path


def load_predictions(run_dir: str | Path, row: Mapping[str, Any]) -> list[Prediction] | None:
    """The predictions of an evaluation row; None where there are none, or those of another scoring of its model.

    Raises:
        DamagedFileError: The file is damaged; the message names file, line and what to do.
    """
    path = predictions_file(run_dir, row)
    if not path.is_file():
        return None
    verify(Path(run_dir), path, REMEDY)
    number = 1
    try:
        first, *rest = path.read_text(encoding="utf-8").splitlines() or [""]
        named = json.loads(first)
        if not isinstance(named, dict) or "theta" not in named:
            raise ValueError("it names no row")
        if named != json.loads(json.dumps(_key(row))):
            return None
        outcomes = []
        for number, line in enumerate(rest, start=2):
            outcomes.append(_LINE.validate_json(line))
            if outcomes[-1].index != number - 2:
                raise ValueError(f"question {outcomes[-1].index} instead of {number - 2}")
        if len(outcomes) != row["examples"]:
            raise ValueError(f"{len(outcomes)} questions instead of {row['examples']}")
    except ValueError as error:
        problem = str(error)
        if isinstance(error, ValidationError):
            found = error.errors(include_url=False)[0]
            problem = f"{'.'.join(map(str, found['loc'])) or 'line'}: {found['msg']}"
        raise DamagedFileError(f"{path}:{number}: {problem}: {REMEDY}") from None
    return outcomes


def _key(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in KEY if name in row}
