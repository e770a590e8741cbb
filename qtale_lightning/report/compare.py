"""Several runs side by side: one table and one figure, from their `results.json`, and paired differences."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from qtale_lightning.files import replacing
from qtale_lightning.report import markdown
from qtale_lightning.report.figures import DPI, STYLES
from qtale_lightning.report.notes import quantization_lines, run_title, theta_text
from qtale_lightning.report.pairs import paired_table
from qtale_lightning.report.scores import score_header, score_text
from qtale_lightning.report.style import plain
from qtale_lightning.report.tables import FactTable
from qtale_lightning.results.fingerprints import same_questions, unidentified
from qtale_lightning.results.schema import Evaluation, Results
from qtale_lightning.results.series import own_rows, series_of
from qtale_lightning.results.store import load_results
from qtale_lightning.tasks import task_title


def compare(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Writes `comparison.md` and `comparison.png` of finished runs to a folder; returns the page.

    Where the runs kept what was answered to each question, their differences are paired by question.

    Raises:
        FileNotFoundError, ValueError: as `load_results` and `paired_table`; fewer than two runs; runs whose validation
            rows were scored under different protocols, which no table may mix.
    """
    if len(run_dirs) < 2:
        raise ValueError("give at least two runs to compare")
    runs = [load_results(run_dir) for run_dir in run_dirs]
    _check_protocols(runs, run_dirs)
    out = Path(out)
    with replacing(out / "comparison.png") as temporary:
        plot_comparison(runs).savefig(temporary, format="png", dpi=DPI)
    page = out / "comparison.md"
    with replacing(page) as temporary:
        temporary.write_text(comparison_markdown(runs, paired_table(run_dirs, runs)), encoding="utf-8")
    return page


def comparison_markdown(runs: Sequence[Results], paired: FactTable | None = None) -> str:
    """Runs × θ in rows, precisions in columns; accuracy ± standard error, nll ± standard error, execution ratio."""
    of_run = series_of(runs)
    precisions, rows_of = _precisions(of_run), [_rows(series) for series in of_run]
    lines = []
    for run, series in zip(runs, of_run, strict=True):
        rows = {(theta_text(row["theta"]), label): row for label, found in series.items() for row in found}
        for theta in dict.fromkeys(theta for theta, _ in rows):
            cells = [_cell(rows[theta, label]) if (theta, label) in rows else "" for label in precisions]
            lines.append([_method(run), theta, *cells])
    headers = ["method", "θ", *precisions]
    one = rows_of[0][0]
    names = (score_header(task_title(t), score["metric"]) for t, score in one["accuracy"].items())
    measured = "Average accuracy in %" if _averaged(rows_of) else " / ".join(names)
    commands = "\n".join(f"{run['run']['command']}  # commit {_commit(run)}" for run in runs)
    pairs = ""
    if paired is not None and paired.rows:
        pairs = f"{markdown.table(paired.headers, paired.rows)}\n\n{paired.title}. {paired.caption}\n\n"
    said = [*_differing(runs), *_making(runs, rows_of)]
    made = f"{markdown.bullets(said)}\n\n" if said else ""
    return (
        f"{markdown.table(headers, lines)}\n\n"
        f"{measured} / nll of the gold answers in nats a token (standard errors), and the measured share of "
        f"layers executed in brackets; {one['examples']:,} validation questions of {len(one['accuracy'])} tasks, "
        f"seed {runs[0]['run']['seed']}. {markdown.escape(runs[0]['run']['hardware'])}.\n\n"
        f"{made}{pairs}{markdown.block(commands)}\n"
    )


def plot_comparison(runs: Sequence[Results]) -> Figure:
    """Accuracy (top) and nll (bottom) against the share of layers executed; a column per precision, a line per run."""
    of_run = series_of(runs)
    precisions, averaged = _precisions(of_run), _averaged([_rows(series) for series in of_run])
    figure = Figure(figsize=(3.6 * len(precisions), 6.4 if averaged else 3.8), layout="constrained")
    panels = figure.subplots(2 if averaged else 1, len(precisions), sharex=True, sharey="row", squeeze=False)
    asked = f"{_rows(of_run[0])[0]['examples']:,} validation questions"
    figure.suptitle(plain(f"{_setting(runs[0])} · {asked}"), fontsize=11)
    for column, label in enumerate(precisions):
        for run, series, style in zip(runs, of_run, STYLES, strict=False):
            rows = sorted(series.get(label, []), key=lambda row: row["execution_ratio"])
            ratio = [row["execution_ratio"] for row in rows]
            accuracy = (
                [100 * (row["average"] or 0.0) for row in rows],
                [100 * (row["average_stderr"] or 0.0) for row in rows],
            )
            nll = [row["average_nll"] for row in rows], [row["average_nll_stderr"] for row in rows]
            for axes, (values, errors) in zip(
                panels[:, column], (accuracy, nll) if averaged else (nll,), strict=True
            ):
                axes.errorbar(
                    ratio,
                    values,
                    errors,
                    label=plain(_method(run)),
                    capsize=2,
                    elinewidth=0.8,
                    markersize=5,
                    **style,
                )
                axes.grid(alpha=0.3)
        panels[0, column].set_title(label, fontsize=10)
        panels[-1, column].set_xlabel("share of layers executed")
    panels[0, 0].set_ylabel("average accuracy, %")
    panels[-1, 0].set_ylabel("average nll, nats")
    panels[0, 0].legend()
    return figure


def _precisions(of_run: Sequence[Mapping[str, list[Evaluation]]]) -> list[str]:
    """Labels of the precisions of all runs, those of more bits first."""
    bits = {label: rows[0]["bits"] for series in of_run for label, rows in series.items()}
    return sorted(bits, key=lambda label: (-bits[label], label))


def _rows(series: Mapping[str, list[Evaluation]]) -> list[Evaluation]:
    return [row for rows in series.values() for row in rows]


def _method(run: Results) -> str:
    return run["run"]["method"]


def _setting(run: Results) -> str:
    """The title of the run without its method, which is what differs."""
    return run_title(run).replace(f" · {_method(run)}", "")


def _commit(run: Results) -> str:
    git = run["run"]["git"]
    return "unknown" if git is None else git["commit"][:10] + (" with changes" if git["dirty"] else "")


def _differing(runs: Sequence[Results]) -> list[str]:
    """What the runs differ in besides their method, of what their training was: each with every run's own."""
    facts: dict[str, list[str]] = {
        "base models": [run["run"]["model"] for run in runs],
        "seeds": [str(run["run"]["seed"]) for run in runs],
        "lengths of training": [
            f"{train['steps']:,} steps, {train['examples']:,} examples"
            if (train := run.get("train"))
            else "unknown"
            for run in runs
        ],
        "precisions of training": [run["run"].get("precision", "unknown") for run in runs],
        "hardware": [run["run"]["hardware"] for run in runs],
    }
    return [
        f"different {name}: "
        + "; ".join(f"{_method(run)} {said}" for run, said in zip(runs, values, strict=True))
        for name, values in facts.items()
        if len({*values}) > 1
    ]


def _making(runs: Sequence[Results], rows_of: Sequence[Sequence[Evaluation]]) -> list[str]:
    """How precisions were made, of each run where they differ; and which runs don't say what made their rows."""
    said = [quantization_lines(rows) for rows in rows_of]
    lines = (
        said[0]
        if all(one == said[0] for one in said)
        else [f"{_method(run)}: {line}" for run, one in zip(runs, said, strict=True) for line in one]
    )
    unknown = [_method(run) for run, rows in zip(runs, rows_of, strict=True) if unidentified(rows)]
    note = f"{', '.join(unknown)}: rows without fingerprints, which don't say by what settings they were made"
    return [*lines, note] if unknown else lines


def _averaged(rows_of: Sequence[Sequence[Evaluation]]) -> bool:
    """Whether all tasks report accuracies, so that there is an average of them."""
    return all(row["average"] is not None for rows in rows_of for row in rows)


def _cell(row: Evaluation) -> str:
    if row["average"] is None or row["average_stderr"] is None:
        scores = " / ".join(score_text(score) for score in row["accuracy"].values())
    else:
        scores = f"{100 * row['average']:.1f} ± {100 * row['average_stderr']:.1f}"
    return f"{scores} / {row['average_nll']:.3f} ± {row['average_nll_stderr']:.3f} [{row['execution_ratio']:.3f}]"


def _check_protocols(runs: Sequence[Results], names: Sequence[str | Path]) -> None:
    for name, run in zip(names, runs, strict=True):
        rows = own_rows(run)
        if not rows:
            raise ValueError(
                f"{name} has no validation rows: 'python -m qtale_lightning thresholds {name}' makes them"
            )
        if not same_questions(rows[0], own_rows(runs[0])[0]):
            raise ValueError(
                f"questions or protocols differ, so the rows don't compare: {names[0]} and {name}"
            )
