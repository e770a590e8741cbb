"""A table's columns: what each shows of a row of results, and how."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtale_lightning.report.scores import score_header
from qtale_lightning.results.schema import Evaluation
from qtale_lightning.tables.table import Answer, Table
from qtale_lightning.tasks import task_title


@dataclass(frozen=True)
class Kind:
    """A column's: its heading, factor and digits, and whether more of it is better (None: neither)."""

    header: str
    better: str | None = None
    factor: float = 1
    digits: int = 3


KINDS = {
    "theta": Kind("θ", digits=6),
    "execution_ratio": Kind("layers executed"),
    "flops_ratio": Kind("counted FLOPs"),
    "weight_mb": Kind("weights, MB", digits=1),
    "kv_kib": Kind("KV, KiB a token", digits=2),
    "seconds": Kind("measured s", digits=1),
    "tokens_per_second": Kind("tokens written / s", digits=1),
    "average": Kind("average %", "higher", 100, 2),
    "nll": Kind("nll ↓", "lower"),
    "added_nll": Kind("added nll", digits=4),
    "path_distance": Kind("path distance"),
}


@dataclass(frozen=True)
class ColumnOf:
    """A column of one data set; `task` where it is a task's score."""

    kind: str
    data: str
    task: str
    shown: Kind

    @property
    def key(self) -> str:
        """Its name in files."""
        return "/".join(part for part in (self.data, self.task or self.kind) if part)


def columns_of(table: Table, answers: Mapping[Any, Answer]) -> list[ColumnOf]:
    """Those of the declaration, by data where lines have several, with one for each task that was scored."""
    several = any(len(table.data_of(line)) > 1 for line in table.lines)
    found: dict[tuple[str, str, str], ColumnOf] = {}
    for data in dict.fromkeys(data for line in table.lines for data in table.data_of(line)):
        rows = [answer.row for (_, at, _), answer in answers.items() if at == data and answer.row]
        label = data if several else ""
        for kind in table.declaration.columns:
            if kind == "average" and _needs_no_average(rows, table.declaration.columns):
                continue
            if kind != "tasks":
                found[kind, data, ""] = ColumnOf(kind, label, "", KINDS[kind])
                continue
            scores = {task: score for row in rows for task, score in row["accuracy"].items()}
            for task, score in scores.items():
                name = score_header(task_title(task), score["metric"])
                if score["metric"] == "perplexity":
                    shown = Kind(name, "lower", 1, 3)
                else:
                    shown = Kind(name.replace("ROUGE-1 / 2 / L", "ROUGE-L"), "higher", 100, 2)
                found[kind, data, task] = ColumnOf(kind, label, task, shown)
    return list(found.values())


def _needs_no_average(rows: Sequence[Evaluation], columns: Sequence[str]) -> bool:
    """Whether tasks measure different things, or one task is shown by itself."""
    if not rows:
        return False
    alone = "tasks" in columns and all(len(row["accuracy"]) == 1 for row in rows)
    return alone or all(row["average"] is None for row in rows)


def heading(column: ColumnOf) -> str:
    """Of a column, with its data set where lines have several."""
    named = column.shown.header.lower().startswith(task_title(column.data).lower())
    return f"{column.data} {column.shown.header}" if column.data and not named else column.shown.header
