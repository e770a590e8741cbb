"""What a table shows, as plain data: every number with its error and the rows that it comes from."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from qtale_lightning.evaluation import cost
from qtale_lightning.manifest import read_object
from qtale_lightning.paths import path_distance
from qtale_lightning.report.notes import quantization_lines
from qtale_lightning.results.fingerprints import comparable
from qtale_lightning.results.schema import Evaluation, units_executed
from qtale_lightning.tables import paper
from qtale_lightning.tables.bold import Side, difference, is_better
from qtale_lightning.tables.columns import ColumnOf, columns_of, heading
from qtale_lightning.tables.declaration import Line
from qtale_lightning.tables.diversity import added_nll
from qtale_lightning.tables.table import Answer, Table, commit_of

Failures = dict[Any, str]


def content(table: Table, command: str, failures: Failures) -> dict[str, Any]:
    """The table: columns, rows with their values and sources, and what its footnotes need.

    Raises:
        ValueError: Rows were scored by different protocols, which no table may mix; predictions are damaged.
    """
    answers = {
        (index, data, seed): table.answer(line, data, seed)
        for index, line in enumerate(table.lines)
        for data in table.data_of(line)
        for seed in table.request.seeds
    }
    columns = columns_of(table, answers)
    rows = [_row(table, index, line, columns, answers, failures) for index, line in enumerate(table.lines)]
    _mark_best(table, columns, rows, answers)
    shown = [answer for answer in answers.values() if answer.row is not None]
    return {
        "table": table.name,
        "title": table.declaration.title,
        "model": table.request.model,
        "base": [file.as_posix() for file in table.base],
        "data": sorted({answer.run.data for answer in answers.values()}),
        "seeds": list(table.request.seeds),
        "command": command,
        "commits": sorted({commit_of(answer.results) for answer in shown}),
        "hardware": sorted({answer.results["run"]["hardware"] for answer in shown}),
        "protocols": _protocols(shown),
        "quantization": quantization_lines(answer.row for answer in shown if answer.row),
        "questions": sorted({answer.row["examples"] for answer in shown if answer.row}),
        "compare": table.declaration.compare,
        "notes": table.declaration.notes,
        "unlike_the_paper": paper.differences(table),
        "columns": [
            {"key": c.key, "header": heading(c), "kind": c.kind, "data": c.data}
            | {"better": c.shown.better, "factor": c.shown.factor, "digits": c.shown.digits}
            for c in columns
        ],
        "rows": rows,
        "differences": _differences(table, columns, rows, answers) if table.declaration.differences else [],
    }


def _row(
    table: Table,
    index: int,
    line: Line,
    columns: Sequence[ColumnOf],
    answers: dict[Any, Answer],
    failures: Failures,
) -> dict[str, Any]:
    found = {key[1:]: answer for key, answer in answers.items() if key[0] == index}
    other = table.declaration.like(line)
    unknown = f"the line {other.name!r}, whose ratio it takes, has no row" if other else "not measured"
    failed = {
        f"{data}, seed {seed}": failures.get(answer.run.directory.root, unknown)
        for (data, seed), answer in found.items()
        if answer.row is None
    }
    values = {}
    for column in columns:
        data = column.data or table.data_of(line)[0]
        rows = [(a, a.row) for (at, _), a in found.items() if at == data]
        if column.kind == "added_nll":
            values[column.key] = _added(table, line, data)
        elif rows and all(row is not None for _, row in rows):
            values[column.key] = _value(column, [(a, row) for a, row in rows if row is not None])
    return {
        "name": line.name,
        "method": line.method,
        "setting": line.setting,
        "options": dict(line.options) | ({"after": line.after} if line.after else {}),
        "perturbation": line.perturbation.record,
        "bits": line.bits,
        "engine": line.engine,
        "group": line.group,
        "values": values,
        "paper": paper.shown(table, line),
        "failed": failed,
        "sources": [_source(table, seed, a) for (_, seed), a in found.items() if a.row is not None],
    }


def _value(column: ColumnOf, rows: Sequence[tuple[Answer, Evaluation]]) -> dict[str, Any]:
    """Mean over seeds with its standard error; over questions where there is one seed; θ as it is."""
    seeds = [_number(column, answer, row) for answer, row in rows]
    if column.kind == "theta":
        return {"seeds": seeds}
    numbers = [value for value, _ in seeds if value is not None]
    if len(numbers) < len(seeds):
        return {"value": None, "stderr": None, "over": None, "seeds": numbers}
    error, over = seeds[0][1], "questions" if seeds[0][1] is not None else None
    if len(numbers) > 1:
        error, over = statistics.stdev(numbers) / math.sqrt(len(numbers)), "seeds"
    return {"value": statistics.fmean(numbers), "stderr": error, "over": over, "seeds": numbers}


def _added(table: Table, line: Line, data: str) -> dict[str, Any]:
    found = added_nll(table, line, data)
    if found is None:
        return {"value": None, "stderr": None, "over": None, "seeds": []}
    over = "seeds" if len(table.request.seeds) > 1 else "questions"
    return {"value": found.value, "stderr": found.stderr, "over": over, "seeds": []}


def _number(column: ColumnOf, answer: Answer, row: Evaluation) -> Any:
    """θ, or a number with its standard error over questions, where it has one."""
    match column.kind:
        case "theta":
            return row["theta"]
        case "tasks":
            score = row["accuracy"].get(column.task)
            return (score["value"], score["stderr"]) if score else (None, None)
        case "average":
            return row["average"], row["average_stderr"]
        case "nll":
            return row["average_nll"], row["average_nll_stderr"]
        case "path_distance":
            return path_distance(units_executed(row)), None
        case "weight_mb":
            return row["weight_bytes"] / 1e6, None
        case "tokens_per_second":
            tokens = row.get("writing_tokens")
            return (tokens / row["writing_seconds"] if tokens else None), None
        case "kv_kib":
            return _kv_bytes(answer, row) / 1024, None
        case kind:
            return row[kind], None  # type: ignore[literal-required]


def _kv_bytes(answer: Answer, row: Evaluation) -> float:
    """Bytes of keys and values that a token leaves, by the layers that it executes on average."""
    run = answer.run.directory
    config = SimpleNamespace(**read_object(run.root, run.model() / "config.json", run.remedy(run.model())))
    return cost.kv_bytes_per_token(config, units_executed(row))


def _source(table: Table, seed: int, answer: Answer) -> dict[str, Any]:
    row = answer.row
    assert row is not None
    root = answer.run.directory.root
    keys = ("split", "bits", "engine", "theta", "examples", "execution_ratio", "fingerprint")
    return {
        "run": str(root.relative_to(table.request.out)),
        "data": answer.run.data,
        "seed": seed,
        "configuration": answer.run.recorded[:12],
        "commit": commit_of(answer.results),
        "command": answer.results["run"]["command"],
        "row": {key: row[key] for key in keys},  # type: ignore[literal-required]
    }


def _protocols(answers: Sequence[Answer]) -> dict[str, Any]:
    """What of the protocol of each data set a score depends on; how decisions are perturbed, lines say themselves."""
    found: dict[str, dict[str, Any]] = {}
    first: dict[str, Answer] = {}
    for answer in answers:
        assert answer.row is not None
        protocol = comparable(answer.row["protocol"])
        protocol.pop("perturbation", None)
        data = answer.run.data
        other = first.setdefault(data, answer)
        if found.setdefault(data, protocol) != protocol:
            differing = [key for key in protocol if protocol[key] != found[data].get(key)]
            raise ValueError(
                f"{answer.run.directory.root} and {other.run.directory.root} were scored by different protocols "
                f"({', '.join(differing)}), so their rows don't compare: score one of them again"
            )
    return found


def _mark_best(
    table: Table, columns: Sequence[ColumnOf], rows: list[dict[str, Any]], answers: dict[Any, Answer]
) -> None:
    """Marks a column's best value in each group of lines, if the paired difference to the next best is significant."""
    groups = _groups(table, rows)
    for column in columns:
        if column.shown.better is None:
            continue
        for group in groups:
            sign = -1 if column.shown.better == "higher" else 1
            valued = [index for index in group if _has(rows[index], column)]
            valued.sort(key=lambda i: sign * rows[i]["values"][column.key]["value"])
            if len(valued) > 1:
                best, next_best = (_sides(table, column, index, answers) for index in valued[:2])
                if is_better(best, next_best, column.task or None, _score(column), column.shown.better):
                    rows[valued[0]]["values"][column.key]["best"] = True


def _differences(
    table: Table, columns: Sequence[ColumnOf], rows: list[dict[str, Any]], answers: dict[Any, Answer]
) -> list[dict[str, Any]]:
    """What each line's average and nll differ by from those of the first line of its group."""
    found = []
    for first, *others in _groups(table, rows):
        for index in others:
            values = {}
            for column in columns:
                there = _has(rows[index], column) and _has(rows[first], column)
                if column.kind in ("average", "nll") and there:
                    ours, theirs = (_sides(table, column, i, answers) for i in (index, first))
                    apart = difference(ours, theirs, None, _score(column))
                    values[column.key] = (
                        {**asdict(apart), "significant": apart.significant} if apart else None
                    )
            found.append({"row": index, "against": first, "values": values})
    return found


def _has(row: dict[str, Any], column: ColumnOf) -> bool:
    return (row["values"].get(column.key) or {}).get("value") is not None


def _groups(table: Table, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Lines that are compared with each other, by their place."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(rows):
        if row["group"] or "group" not in table.declaration.compare:
            groups.setdefault(tuple(row[key] for key in table.declaration.compare), []).append(index)
    return list(groups.values())


def _score(column: ColumnOf) -> str:
    """Which of the scores of a question a column is the mean of."""
    return "nll" if column.kind == "nll" else "value"


def _sides(table: Table, column: ColumnOf, index: int, answers: dict[Any, Answer]) -> list[Side]:
    data = column.data or table.data_of(table.lines[index])[0]
    found = [answers[index, data, seed] for seed in table.request.seeds]
    return [side for answer in found if (side := answer.side)]
