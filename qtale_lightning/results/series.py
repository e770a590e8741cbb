"""Which rows of a run's results stand together: those of its own questions, by precision, and which one is selected."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

from qtale_lightning.digests import of_split
from qtale_lightning.results.fingerprints import same_questions
from qtale_lightning.results.schema import Evaluation, Results
from qtale_lightning.results.selection import Selected
from qtale_lightning.results.store import place, same_theta

Split = Literal["calibration", "validation"]
NOT_PERTURBED: Mapping[str, Any] = MappingProxyType({})


def own_rows(
    results: Results, split: Split = "validation", perturbation: Mapping[str, Any] = NOT_PERTURBED
) -> list[Evaluation]:
    """The rows of the run's own questions, in order; of the most questions, where the run doesn't say which they are.

    A look at a few of them, or at others, never takes their place; nor do rows of decisions that were perturbed
    otherwise than asked for, which is not at all.
    """
    own = own_questions(results, split)
    groups: list[list[Evaluation]] = []
    rows = [
        row for row in results["evaluation"] if row["split"] == split and perturbation_of(row) == perturbation
    ]
    for row in sorted(rows, key=place):
        group = next((group for group in groups if same_questions(group[0], row)), None)
        if group is None:
            groups.append([row])
        else:
            group.append(row)

    def rank(group: list[Evaluation]) -> tuple[bool, int, int]:
        found = group[0].get("fingerprint")
        return (
            own is not None and found is not None and found["questions"] == own,
            group[0]["examples"],
            len(group),
        )

    return max(groups, key=rank, default=[])


def perturbation_of(row: Evaluation) -> Mapping[str, Any]:
    """How a row's decisions were perturbed, as `qtale_lightning.routing.perturbation` says it; empty: not at all."""
    return row["protocol"].get("perturbation", NOT_PERTURBED)


def own_questions(results: Results, split: Split) -> str | None:
    """The digest of the questions that the run began with; None where it doesn't say."""
    made_from = results["run"].get("made_from") if "run" in results else None
    return of_split(made_from["rows"][split]) if made_from else None


def other_rows(results: Results) -> list[Evaluation]:
    """The validation rows of other questions than the run's own, or asked otherwise; those of the most first."""
    own = own_rows(results)
    rows = [row for row in results["evaluation"] if row["split"] == "validation" and row not in own]
    return sorted(rows, key=lambda row: (-row["examples"], place(row)))


def validation_series(
    results: Results, perturbation: Mapping[str, Any] = NOT_PERTURBED
) -> dict[str, list[Evaluation]]:
    """The validation rows of each quantized model, θ descending, by a label: "4-bit", or "4-bit native" where
    several engines share the bits. Only those of the run's own questions, with decisions perturbed so."""
    return series_of([results], perturbation)[0]


def series_of(
    runs: Sequence[Results], perturbation: Mapping[str, Any] = NOT_PERTURBED
) -> list[dict[str, list[Evaluation]]]:
    """Each run's :func:`validation_series`, with the same label for the same bits and engine in all of them."""
    of_run = [own_rows(run, "validation", perturbation) for run in runs]
    labels = iter(labels_of(row for rows in of_run for row in rows))
    found: list[dict[str, list[Evaluation]]] = []
    for rows in of_run:
        found.append({})
        for row in rows:
            found[-1].setdefault(next(labels), []).append(row)
    return found


def labels_of(rows: Iterable[Evaluation]) -> list[str]:
    """The precision of each row in words, with the engine where several share the bits."""
    rows = list(rows)
    engines: dict[float, set[str]] = {}
    for row in rows:
        engines.setdefault(row["bits"], set()).add(row["engine"])
    return [
        f"{row['bits']}-bit {row['engine']}" if len(engines[row["bits"]]) > 1 else f"{row['bits']}-bit"
        for row in rows
    ]


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
