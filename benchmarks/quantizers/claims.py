"""What the rows say: means over calibration sets, and ratios of engines on the same sets."""

import statistics
from collections.abc import Sequence
from typing import Any

from common import claim
from rich.console import Console
from rich.table import Table

from quantizers.entries import STEPS

Row = dict[str, Any]

SECONDS = "search CPU s"
AGAINST_AUTOAWQ = (
    (SECONDS, 20, "higher"),
    ("KL", 1, "lower"),
    ("centred MSE", 1, "lower"),
    ("logits MSE", 1, "lower"),
)
LEARNED = {4: 0.9, 3: 0.7, 2: 0.5}  # KL of learned rounding over native's, by bits: the goals
AGAINST_AUTO_ROUND = ((SECONDS, 3, "higher"), ("KL", 1, "lower"))


def claims(rows: Sequence[Row], autoawq_bits: Sequence[int], signround_bits: Sequence[int]) -> list[Row]:
    """The goals that there are rows for; ratios are means over the sets that both engines have."""
    fewer = dict.fromkeys(row["engine"] for row in rows if row["engine"].endswith(STEPS))
    learned = [(b, engine) for engine in ("signround", *fewer) for b in signround_bits]
    goals = (
        *((b, "native", "autoawq", *goal) for b in autoawq_bits for goal in AGAINST_AUTOAWQ),
        *((b, engine, "native", "KL", LEARNED.get(b, 1), "lower") for b, engine in learned),
        *((b, engine, "auto-round", *goal) for b, engine in learned for goal in AGAINST_AUTO_ROUND),
        *((b, "signround, norm kept", "auto-round", "KL", 1, "lower") for b in signround_bits),
    )
    made = []
    for bits, ours, theirs, key, goal, better in goals:
        first, second = (theirs, ours) if better == "higher" else (ours, theirs)
        ratios = paired(rows, bits, first, second, key)
        if ratios:
            over = f"mean of {len(ratios)} sets (± {error(ratios):.2f})" if len(ratios) > 1 else "one set"
            name = f"{key}, {first} over {second}, {bits} bits, {over}"
            made.append(claim(name, statistics.mean(ratios), goal, better))
    return made


def paired(rows: Sequence[Row], bits: float, first: str, second: str, key: str) -> list[float]:
    """Ratios of two engines' figures, by the sets that both have."""
    one, other = (
        {r["set"]: r[key] for r in rows if (r["engine"], r["bits"]) == (e, bits)} for e in (first, second)
    )
    return [one[number] / other[number] for number in sorted(one.keys() & other) if other[number]]


def error(values: Sequence[float]) -> float:
    """Standard error of a mean of two or more."""
    return statistics.stdev(values) / len(values) ** 0.5


def _mean(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    return f"{statistics.mean(ratios):.3f}" + (f" ± {error(ratios):.3f}" if len(ratios) > 1 else "")


def show_means(rows: Sequence[Row]) -> None:
    """Prints, by bits and engine, means over sets, and those of the ratios to engines on the same sets."""
    against = ("native", "signround", "auto-round")
    table = Table(title="means over calibration sets")
    for column in ("bits", "engine", "sets", SECONDS, "KL", *(f"KL over {name}'s" for name in against)):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for bits, engine in dict.fromkeys((row["bits"], row["engine"]) for row in rows if row["bits"] < 16):
        mine = [row for row in rows if (row["engine"], row["bits"]) == (engine, bits)]
        found = [paired(rows, bits, engine, name, "KL") if name != engine else [] for name in against]
        table.add_row(
            f"{bits:g}", engine, str(len(mine)), f"{statistics.mean(row[SECONDS] for row in mine):.1f}",
            f"{statistics.mean(row['KL'] for row in mine):.4f}",
            *(_mean(ratios) for ratios in found),
        )  # fmt: skip
    Console(width=140).print(table)
