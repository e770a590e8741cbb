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

from qtale_lightning.files import replacing
from qtale_lightning.report.fields import Bits, Count, Fraction, Number, Quantity, Thresholds
from qtale_lightning.report.routing import Changes, Routing
from qtale_lightning.report.scores import TaskScores
from qtale_lightning.report.selection import Search, Selected

SCHEMA: Literal[1] = 1
FILE_NAME = "results.json"


class Git(TypedDict):
    """The commit that ran; `dirty`: tracked files differed from it."""

    commit: str
    dirty: bool


class Run(TypedDict):
    """What ran, and on what: `source` is where the base model was taken from, `precision` training's, as Lightning
    names it; `git` is None outside a repository."""

    model: str
    source: NotRequired[str]
    method: str
    data: str
    seed: int
    precision: NotRequired[str]
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
    "selected": "sweep",
    "searches": "sweep",
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
        ValueError: the file isn't JSON (with line and column) or doesn't follow the schema (with the keys).
    """
    path = Path(run_dir) / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} doesn't exist. 'make train MODEL=… METHOD=… DATA=…' makes a run and its results; for a "
            f"trained run, 'python -m qtale_lightning evaluate {run_dir}' writes them."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        place = f"{path}, line {error.lineno}, column {error.colno}"
        raise ValueError(f"{place}: not JSON ({error.msg})") from error
    return validate(content, str(path))


def save_results(run_dir: str | Path, results: Results) -> Path:
    """Checks `results` and writes them atomically to `<run_dir>/results.json`, whose path it returns.

    Raises:
        ValueError: `results` don't follow the schema; the file stays as it was.
    """
    path = Path(run_dir) / FILE_NAME
    validate(results, str(path))
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
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
    """Adds an evaluation, in place of one with the same bits, engine, θ and split, and returns the results.

    Rows are kept in order: by split, then bits (descending), engine and θ (descending; those with one a layer last).

    Raises:
        ValueError: the row doesn't follow the schema; the file stays as it was.
    """
    alone = {"schema": SCHEMA, "evaluation": [row], "selected": []}
    validate(alone, f"the new row for {Path(run_dir) / FILE_NAME}")
    results = load_or_new(run_dir)
    kept = [other for other in results["evaluation"] if _identity(other) != _identity(row)]
    results["evaluation"] = sorted([*kept, row], key=_identity)
    save_results(run_dir, results)
    return results


def load_or_new(run_dir: str | Path) -> Results:
    """`load_results`, and empty ones where there are none yet."""
    if (Path(run_dir) / FILE_NAME).is_file():
        return load_results(run_dir)
    return {"schema": SCHEMA, "evaluation": [], "selected": []}


def _identity(row: Evaluation) -> tuple[str, float, str, int, list[float]]:
    """What makes a row unique, as a sort key. θ is rounded: 0.1 + 0.2 and 0.3 are one grid point."""
    theta = row["theta"]
    values = theta if isinstance(theta, list) else [-1.0 if theta is None else theta]
    many = len(values) if isinstance(theta, list) else 0
    return row["split"], -row["bits"], row["engine"], many, [-round(value, 9) for value in values]


def validation_series(results: Results) -> dict[str, list[Evaluation]]:
    """The validation rows of each quantized model, θ descending, by a label: "4-bit", or "4-bit native" where
    several engines share the bits."""
    rows = sorted((row for row in results["evaluation"] if row["split"] == "validation"), key=_identity)
    engines: dict[float, set[str]] = {}
    for row in rows:
        engines.setdefault(row["bits"], set()).add(row["engine"])
    series: dict[str, list[Evaluation]] = {}
    for row in rows:
        several = len(engines[row["bits"]]) > 1
        label = f"{row['bits']}-bit {row['engine']}" if several else f"{row['bits']}-bit"
        series.setdefault(label, []).append(row)
    return series


def best_row(rows: list[Evaluation]) -> Evaluation:
    """The row of the highest average accuracy, or of the lowest nll where there is no average."""
    return max(rows, key=lambda row: -row["average_nll"] if row["average"] is None else row["average"])


def selected_row(results: Results, rows: list[Evaluation]) -> Evaluation | None:
    """The row of a series at its selected θ, the first one where each of several budgets has its own; a series of one
    row (no sweep) is its own choice."""
    chosen = [(choice, row) for row in rows if (choice := selected_choice(results, row))]
    if chosen:
        return min(chosen, key=lambda pair: results["selected"].index(pair[0]))[1]
    return rows[0] if len(rows) == 1 else None


def selected_choice(results: Results, row: Evaluation) -> Selected | None:
    """The selection that a row is the outcome of."""
    for choice in results["selected"]:
        same_engine = choice.get("engine", row["engine"]) == row["engine"]
        if choice["bits"] == row["bits"] and same_engine and same_theta(choice["theta"], row["theta"]):
            return choice
    return None


def same_theta(one: float | list[float] | None, other: float | list[float] | None) -> bool:
    """Whether two θ, or lists of one a layer, are the same grid point."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_theta, one, other))
    if one is None or other is None or isinstance(one, list) or isinstance(other, list):
        return one is other
    return abs(one - other) < 1e-9
