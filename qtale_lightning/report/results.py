"""`<run>/results.json`, a run's source of truth: its schema, and how it is read, checked and written.

Tables, plots and W&B's copies are made from this file. Accuracies and ratios are fractions (0.71, not 71 %),
negative log-likelihoods (nll) are in nats, weights in bytes, times in seconds. A section is missing until the
stage that writes it has run.
"""

import json
from pathlib import Path
from typing import Any, Literal, NotRequired, cast

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from qtale_lightning.fingerprint import Fingerprint, same_questions
from qtale_lightning.manifest import DamagedFileError, read_object, writing
from qtale_lightning.report.fields import Bits, Count, Fraction, Number, Quantity, Thresholds
from qtale_lightning.report.routing import Changes, Routing
from qtale_lightning.report.scores import TaskScores
from qtale_lightning.report.selection import Search, Selected

SCHEMA: Literal[1] = 1
FILE_NAME = "results.json"
REMEDY = (
    "remove it and start the run's command again: what training counted comes back from its last checkpoint, and what "
    "is missing is measured again"
)


class Git(TypedDict):
    """The commit that ran; `dirty`: tracked files differed from it."""

    commit: str
    dirty: bool


class MadeFrom(TypedDict):
    """Digests of what a run began with: the `base` model's folder (a hub's id as it is, None where the model has its
    own source), the `files` of rows, and the `rows` as they were encoded, by split and task."""

    base: str | None
    files: str | None
    rows: dict[str, dict[str, str]]


class Run(TypedDict):
    """What ran, from what, and on what: `source` is where the base model was taken from, `precision` training's, as
    Lightning names it; `git` is None outside a repository. `made_from` is missing from older runs."""

    model: str
    source: NotRequired[str]
    method: str
    data: str
    seed: int
    precision: NotRequired[str]
    made_from: NotRequired[MadeFrom]
    git: Git | None
    versions: dict[str, str]
    hardware: str
    command: str


class Train(TypedDict):
    """Training facts: unpadded input `tokens`, and in `final_losses` the last logged value of each term."""

    steps: Count
    examples: Count
    tokens: Count
    seconds: Quantity
    tokens_per_second: Quantity
    trainable_parameters: Count
    final_losses: dict[str, Number]


class Evaluation(TypedDict):
    """One evaluation of one model at one θ. `average` is the mean over tasks, where all of them report an accuracy;
    None where they measure different things, and `no_average` says so.

    `execution_ratio` is executed layers over all layers, `flops_ratio` counted FLOPs over the base model's
    (routers included, so it can pass 1), `seconds` the measured time of this evaluation, and `engine` the
    quantizer ("none" at 16 bits). `execution_ratio_per_layer` has shape `(layers,)`. Evaluations made together share
    the time of what can't differ between them; written answers take `writing_seconds` more. `dtype` is what the model
    computed in. What was answered to each question lies in `predictions/`, and what was written in `generations/`.
    `fingerprint` says which model answered which questions; older rows have none, and are measured again where they
    are asked for.
    """

    bits: Bits
    engine: str
    theta: Thresholds
    split: Literal["calibration", "validation"]
    examples: Count
    execution_ratio: Fraction
    flops_ratio: Quantity
    accuracy: dict[str, TaskScores]
    average: Fraction | None
    average_stderr: Quantity | None
    no_average: NotRequired[str]
    average_nll: Number
    average_nll_stderr: Quantity
    execution_ratio_per_layer: list[Fraction]
    weight_bytes: Count
    seconds: Quantity
    dtype: NotRequired[str]
    writing_seconds: NotRequired[Quantity]
    protocol: dict[str, Any]
    fingerprint: NotRequired[Fingerprint]


class Results(TypedDict):
    """The whole file."""

    schema: Literal[1]
    run: NotRequired[Run]
    train: NotRequired[Train]
    routing: NotRequired[Routing]
    evaluation: list[Evaluation]
    selected: list[Selected]
    searches: NotRequired[list[Search]]
    changes: NotRequired[list[Changes]]


WRITTEN_BY = {
    "run": "fit",
    "train": "fit",
    "routing": "fit",
    "evaluation": "evaluate",
    "selected": "thresholds",
    "searches": "thresholds",
    "changes": "inspect",
}
"""The sections, and the stage that writes each."""

_SCHEMA = TypeAdapter(Results)


def validate(results: object, source: str = FILE_NAME) -> Results:
    """Checks keys, types and ranges, and returns `results` unchanged, typed.

    Raises:
        ValueError: names `source`, each offending key (the first five) and the stage that writes it.
    """
    try:
        _SCHEMA.validate_python(results, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        lines = [f"  {_where(p['loc'])}: {_explain(p)}" for p in problems[:5]]
        if len(problems) > 5:
            lines.append(f"  … and {len(problems) - 5} more")
        sections = {str(p["loc"][0]) for p in problems if p["loc"]}
        stages = sorted({WRITTEN_BY[section] for section in sections if section in WRITTEN_BY})
        remedy = f"\nWritten by: python -m qtale_lightning {', '.join(stages)}" if stages else ""
        raise ValueError(f"{source} isn't a valid results file:\n" + "\n".join(lines) + remedy) from None
    return cast(Results, results)


def _where(keys: tuple[int | str, ...]) -> str:
    """Keys joined with dots, without the metric that pydantic puts in front of a task's own keys."""
    in_task = keys[:1] == ("evaluation",) and keys[2:3] == ("accuracy",)
    return ".".join(map(str, (*keys[:4], *keys[5:]) if in_task else keys)) or "top level"


def _explain(problem: Any) -> str:
    if problem["type"] == "missing":
        return "is missing"
    return f"{problem['msg']}, not {problem['input']!r:.60}"


def load_results(run_dir: str | Path) -> Results:
    """Reads and checks `<run_dir>/results.json`.

    Raises:
        FileNotFoundError: the run has no results yet; the message names the command that makes them.
        DamagedFileError: the file isn't what the run wrote, isn't JSON (with line and column) or doesn't follow the
            schema (with the keys); and what to do about it.
    """
    path = Path(run_dir) / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} doesn't exist. 'make train MODEL=… METHOD=… DATA=…' makes a run and its results; for a "
            f"trained run, 'python -m qtale_lightning evaluate {run_dir}' writes them."
        )
    content = read_object(path.parent, path, REMEDY)
    try:
        return validate(content, str(path))
    except ValueError as error:
        raise DamagedFileError(f"{error}\nOr {REMEDY}.") from None


def save_results(run_dir: str | Path, results: Results) -> Path:
    """Checks `results` and writes them atomically to `<run_dir>/results.json`, whose path it returns.

    Raises:
        ValueError: `results` don't follow the schema; the file stays as it was.
    """
    path = Path(run_dir) / FILE_NAME
    validate(results, str(path))
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    with writing(path.parent, path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def update_results(run_dir: str | Path, section: str, value: object) -> Results:
    """Replaces one section of a run's results, which it starts where there are none, and returns them.

    Raises:
        ValueError: there is no such section, or its value doesn't follow the schema.
    """
    if section not in WRITTEN_BY:
        raise ValueError(f"results have no section {section!r}; the sections are {', '.join(WRITTEN_BY)}")
    results = cast(Results, {**load_or_new(run_dir), section: value})
    save_results(run_dir, results)
    return results


def upsert_evaluation(run_dir: str | Path, row: Evaluation) -> Results:
    """Adds an evaluation, in place of one of the same questions with the same bits, engine, θ and split.

    Rows are kept in order: by split, then bits (descending), engine and θ (descending; those with one a layer last).

    Returns:
        The results.

    Raises:
        ValueError: the row doesn't follow the schema; the file stays as it was.
    """
    alone = {"schema": SCHEMA, "evaluation": [row], "selected": []}
    validate(alone, f"the new row for {Path(run_dir) / FILE_NAME}")
    results = load_or_new(run_dir)
    kept = [
        other
        for other in results["evaluation"]
        if place(other) != place(row) or not same_questions(other, row)
    ]
    results["evaluation"] = sorted([*kept, row], key=place)
    save_results(run_dir, results)
    return results


def forget(run_dir: str | Path, bits: float, engine: str) -> list[Evaluation]:
    """Removes what results say of a quantized model that another one takes the place of.

    Returns:
        The evaluations that are removed.
    """
    results = load_or_new(run_dir)
    rows: dict[str, list[Any]] = {}
    for section in ("evaluation", "selected", "searches", "changes"):
        rows[section] = list(results.get(section, []))  # type: ignore[call-overload]
    others = {
        section: [one for one in found if (one["bits"], one.get("engine", engine)) != (bits, engine)]
        for section, found in rows.items()
    }
    if others != rows:
        changed = {section: found for section, found in others.items() if section in results}
        save_results(run_dir, cast(Results, {**results, **changed}))
    return [row for row in rows["evaluation"] if row not in others["evaluation"]]


def load_or_new(run_dir: str | Path) -> Results:
    """`load_results`, and empty ones where there are none yet."""
    if (Path(run_dir) / FILE_NAME).is_file():
        return load_results(run_dir)
    return {"schema": SCHEMA, "evaluation": [], "selected": []}


def place(row: Evaluation) -> tuple[str, float, str, int, list[float]]:
    """What makes a row unique among those of the same questions, as a sort key.

    θ is rounded: 0.1 + 0.2 and 0.3 are one grid point.
    """
    theta = row["theta"]
    values = theta if isinstance(theta, list) else [-1.0 if theta is None else theta]
    many = len(values) if isinstance(theta, list) else 0
    return row["split"], -row["bits"], row["engine"], many, [-round(value, 9) for value in values]


def same_theta(one: float | list[float] | None, other: float | list[float] | None) -> bool:
    """Whether two θ, or lists of one a layer, are the same grid point."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_theta, one, other))
    if one is None or other is None or isinstance(one, list) or isinstance(other, list):
        return one is other
    return abs(one - other) < 1e-9
