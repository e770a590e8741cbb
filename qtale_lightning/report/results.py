"""`<run>/results.json`, a run's source of truth: its schema, and how it is read, checked and written.

Tables, plots and W&B's copies are made from this file. Accuracies and ratios are fractions (0.71, not 71 %),
negative log-likelihoods (nll) are in nats, weights in bytes, times in seconds. A section is missing until the
stage that writes it has run.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from qtale_lightning.files import replacing

SCHEMA: Literal[1] = 1
FILE_NAME = "results.json"

Number = Annotated[float, Field(allow_inf_nan=False)]
Quantity = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Bits = Annotated[int | float, Field(ge=1, le=32)]
"""Of a weight's code; a fraction is the average over linears of several widths."""
Threshold = Fraction | None
"""θ: a token executes a layer iff p(execute) >= θ. None: a model without routers."""


class Git(TypedDict):
    """The commit that ran; `dirty`: tracked files differed from it."""

    commit: str
    dirty: bool


class Run(TypedDict):
    """What ran, and on what. `git` is None outside a repository."""

    model: str
    method: str
    data: str
    seed: int
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


class Routing(TypedDict):
    """How the routers decide at the end of training; a run without routers has no such section.

    `flip_ratio` is the share of decisions that Gumbel noise flips, `logit_gap` the mean distance between the
    execute and the skip logit, `entropy` the mean binary entropy in nats; `execution_ratio_per_layer` has
    shape `(layers,)`.
    """

    flip_ratio: Fraction
    logit_gap: Quantity
    entropy: Quantity
    execution_ratio_per_layer: list[Fraction]


class TaskAccuracy(TypedDict):
    """One task's scores. `value` and `stderr` are those of `metric`, the one it reports (acc or acc_norm)."""

    value: Fraction
    stderr: Quantity
    metric: str
    nll: Number
    acc: Fraction
    acc_norm: Fraction
    examples: Count


class Evaluation(TypedDict):
    """One evaluation of one model at one θ. `average` is the mean over tasks.

    `execution_ratio` is executed layers over all layers, `flops_ratio` counted FLOPs over the base model's
    (routers included, so it can pass 1), `seconds` the measured time of this evaluation, and `engine` the
    quantizer ("none" at 16 bits). `execution_ratio_per_layer` has shape `(layers,)`.
    """

    bits: Bits
    engine: str
    theta: Threshold
    split: Literal["calibration", "validation"]
    examples: Count
    execution_ratio: Fraction
    flops_ratio: Quantity
    accuracy: dict[str, TaskAccuracy]
    average: Fraction
    average_stderr: Quantity
    average_nll: Number
    average_nll_stderr: Quantity
    execution_ratio_per_layer: list[Fraction]
    weight_bytes: Count
    seconds: Quantity
    protocol: dict[str, Any]


class Selected(TypedDict):
    """The θ chosen for one precision and the rule, in words. `engine` is needed where several share the bits.

    The report takes its figures from the validation row at this θ; those here are for whoever reads the JSON.
    """

    bits: Bits
    engine: NotRequired[str]
    theta: Threshold
    rule: str
    average: Fraction
    average_stderr: Quantity
    average_nll: Number
    execution_ratio: Fraction


class Results(TypedDict):
    """The whole file."""

    schema: Literal[1]
    run: NotRequired[Run]
    train: NotRequired[Train]
    routing: NotRequired[Routing]
    evaluation: list[Evaluation]
    selected: list[Selected]


WRITTEN_BY = {"run": "fit", "train": "fit", "routing": "fit", "evaluation": "evaluate", "selected": "sweep"}
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
        lines = [f"  {'.'.join(map(str, p['loc'])) or 'top level'}: {_explain(p)}" for p in problems[:5]]
        if len(problems) > 5:
            lines.append(f"  … and {len(problems) - 5} more")
        sections = {str(p["loc"][0]) for p in problems if p["loc"]}
        stages = sorted({WRITTEN_BY[section] for section in sections if section in WRITTEN_BY})
        remedy = f"\nWritten by: python -m qtale_lightning {', '.join(stages)}" if stages else ""
        raise ValueError(f"{source} isn't a valid results file:\n" + "\n".join(lines) + remedy) from None
    return cast(Results, results)


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
    results = cast(Results, {**_load_or_new(run_dir), section: value})
    save_results(run_dir, results)
    return results


def upsert_evaluation(run_dir: str | Path, row: Evaluation) -> Results:
    """Adds an evaluation, in place of one with the same bits, engine, θ and split, and returns the results.

    Rows are kept in order: by split, then bits (descending), engine and θ (descending).

    Raises:
        ValueError: the row doesn't follow the schema; the file stays as it was.
    """
    alone = {"schema": SCHEMA, "evaluation": [row], "selected": []}
    validate(alone, f"the new row for {Path(run_dir) / FILE_NAME}")
    results = _load_or_new(run_dir)
    kept = [other for other in results["evaluation"] if _identity(other) != _identity(row)]
    results["evaluation"] = sorted([*kept, row], key=_identity)
    save_results(run_dir, results)
    return results


def _load_or_new(run_dir: str | Path) -> Results:
    if (Path(run_dir) / FILE_NAME).is_file():
        return load_results(run_dir)
    return {"schema": SCHEMA, "evaluation": [], "selected": []}


def _identity(row: Evaluation) -> tuple[str, float, str, float]:
    """What makes a row unique, as a sort key. θ is rounded: 0.1 + 0.2 and 0.3 are one grid point."""
    theta = row["theta"]
    return row["split"], -row["bits"], row["engine"], 1.0 if theta is None else -round(theta, 9)


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


def selected_row(results: Results, rows: list[Evaluation]) -> Evaluation | None:
    """The row of a series at its selected θ; a series of one row (no sweep) is its own choice."""
    chosen = next((row for row in rows if selected_choice(results, row)), None)
    return rows[0] if chosen is None and len(rows) == 1 else chosen


def selected_choice(results: Results, row: Evaluation) -> Selected | None:
    """The selection that a row is the outcome of."""
    for choice in results["selected"]:
        same_engine = choice.get("engine", row["engine"]) == row["engine"]
        if choice["bits"] == row["bits"] and same_engine and same_theta(choice["theta"], row["theta"]):
            return choice
    return None


def same_theta(one: float | None, other: float | None) -> bool:
    """Whether two θ are the same grid point."""
    if one is None or other is None:
        return one is other
    return abs(one - other) < 1e-9
