"""Schedules of a precision that falls while a text is written, as people and files write them."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple


class Phase(NamedTuple):
    """From how many written tokens on which precision computes, and with which θ; None: the call's."""

    tokens: int
    bits: int
    threshold: float | None = None

    def __str__(self) -> str:
        return f"{self.tokens}:{self.bits}" + ("" if self.threshold is None else f":{self.threshold:g}")


class Schedule(tuple[Phase, ...]):
    """A schedule's phases: `0:4,32:3` on the command line and in results, `[[0, 4], [32, 3]]` in a generation
    configuration are 4 bits for the prompt and until 32 tokens are written, then 3; a third number is θ from there on.
    """

    def __str__(self) -> str:
        return ",".join(map(str, self))

    def rows(self) -> list[list[int | float]]:
        """As a generation configuration has it."""
        return [[one for one in phase if one is not None] for phase in self]

    @staticmethod
    def read(value: Any) -> "Schedule":
        """From either form.

        Raises:
            ValueError: It is none, doesn't begin at 0, numbers of tokens don't rise, or bits do.
        """
        rows = value
        if isinstance(value, str):
            rows = [[_number(part) for part in phase.split(":")] for phase in value.split(",")]
        if not isinstance(rows, Sequence) or not rows or not all(map(_is_phase, rows)):
            raise ValueError(
                f"{value!r} is no schedule of bits: give tokens written and bits of each phase, such as 0:4,32:3 "
                "([[0, 4], [32, 3]] in a generation configuration), and a θ in [0, 1] behind them where it changes"
            )
        phases = Schedule(Phase(*row) for row in rows)
        if phases[0].tokens:
            raise ValueError(
                f"the schedule {phases} says nothing of the first token: begin with 0:{phases[0].bits}"
            )
        for before, after in pairwise(phases):
            if after.tokens <= before.tokens:
                raise ValueError(
                    f"the schedule {phases} has {after.tokens} tokens behind {before.tokens}: they must rise"
                )
            if after.bits > before.bits:
                raise ValueError(
                    f"the schedule {phases} rises from {before.bits} to {after.bits} bits: precision can only fall "
                    "while a text is written, since what was computed with less stays so"
                )
        return phases


def _number(text: str) -> int | float | None:
    if re.fullmatch(r"\d+", text):
        return int(text)
    return float(text) if re.fullmatch(r"\d*\.\d+|\d+\.\d*", text) else None


def _is_phase(row: Any) -> bool:
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) not in (2, 3):
        return False
    whole = all(type(one) is int and one >= 0 for one in row[:2])
    return whole and (len(row) == 2 or (isinstance(row[2], int | float) and 0 <= row[2] <= 1))
