"""Measures entries that aren't in the record yet, one after the other, and says how long the rest takes."""

import statistics
import time
from collections.abc import Sequence

from common import show

from quantizers.entries import Entry
from quantizers.record import Record


def measure(entries: Sequence[Entry], record: Record, minutes: float | None) -> int:
    """Runs what is missing; what has ended is in the record's file at once.

    Args:
        minutes: Nothing is begun that would end later, as far as is known.

    Returns:
        How many are left.
    """
    began, judging = time.perf_counter(), list[float]()
    waiting = [one for one in entries if not _done(one, record)]
    print(f"{len(entries) - len(waiting)} of {len(entries)} searches are there already", flush=True)
    for i, entry in enumerate(waiting):
        passed = (time.perf_counter() - began) / 60
        expected = _minutes([entry], record, judging)
        if minutes is not None and passed + (expected or 0) > minutes:
            print(
                f"{entry} would take about {expected or 0:.0f} of the {minutes:g} minutes: the same command goes on"
            )
            return len(waiting) - i
        left = _minutes(waiting[i:], record, judging)
        said = f", about {left:.0f} minutes left" if left is not None else ""
        print(f"{entry}, {i + 1} of {len(waiting)}{said}", flush=True)
        started = time.perf_counter()
        rows = entry.run()
        judging.append((time.perf_counter() - started - rows[0]["search s"]) / len(rows))
        record.add(rows)
        for row in rows:
            show(row)
    return 0


def _done(entry: Entry, record: Record) -> bool:
    return all(record.has(name, entry.bits, entry.number) for name in entry.names)


def _minutes(entries: Sequence[Entry], record: Record, judging: Sequence[float]) -> float | None:
    """How long some entries take, by what has been measured; None where nothing has been that says so."""
    known: dict[str, list[float]] = {}
    for row in record.rows:
        known.setdefault(row["engine"], []).append(row["search s"])
    total = 0.0
    for entry in entries:
        models = len(entry.bits) * len(entry.names)
        roughly = entry.roughly
        if entry.engine in known:
            total += statistics.mean(known[entry.engine])
        elif "native" in known:
            total += roughly * statistics.mean(known["native"])
        elif roughly:
            return None
        total += models * statistics.mean(judging) if judging else 0
    return total / 60
