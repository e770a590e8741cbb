"""`<run>/results.json`, a run's source of truth: how it is read and written. Tables, plots and W&B's copies are made
from this file.
"""

import json
from pathlib import Path
from typing import Any, cast

from qtale_lightning.manifest import DamagedFileError, read_object, writing
from qtale_lightning.results.fingerprints import same_questions
from qtale_lightning.results.schema import FILE_NAME, SCHEMA, WRITTEN_BY, Evaluation, Results, validate

REMEDY = (
    "remove it and start the run's command again: what training counted comes back from its last checkpoint, and what "
    "is missing is measured again"
)


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
        section: [
            one for one in found if (one["bits"], one.get("engine", engine).split("+")[0]) != (bits, engine)
        ]
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
