"""Inspection: which layers each token executes, at each precision, as a page and as data."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.digests import of
from qtale_lightning.evaluation.trace import Text, Trace, document, measure_changes, trace
from qtale_lightning.manifest import writing
from qtale_lightning.quantization.engines import find
from qtale_lightning.report.notes import run_title
from qtale_lightning.report.page import render_page
from qtale_lightning.results.routing import Changes
from qtale_lightning.results.store import load_results, same_theta, update_results
from qtale_lightning.run import RunDirectory
from qtale_lightning.stages.export import load_exported, missing
from qtale_lightning.stages.loading import load_tokenizer
from qtale_lightning.stages.progress import console

log = logging.getLogger(__name__)

SHOWN = 30
"""Questions on a page: what a browser shows at once and a reader can look through."""


def inspect(
    run: RunDirectory,
    bits: Sequence[float] | None,
    engine: str,
    theta: float | None,
    texts: Sequence[Text],
    measured: bool,
) -> Path:
    """Trace texts at 16 bits and at each quantized precision, and write ``<run>/inspect/theta-<θ>.html`` and ``.json``.

    Args:
        run: With an exported model.
        bits: Precisions beside 16 bits; None takes all that the engine has made.
        engine: Whose quantized models.
        theta: Of all precisions; None is the model's own.
        texts: What to trace; a page shows 30 of them, evenly chosen.
        measured: Texts are validation questions: what quantization changes is measured on all of them and kept in
            results.json. Otherwise files are named ``text-theta-<θ>``.

    Returns:
        The page.

    Raises:
        ValueError: The model's method has no θ, or the model one of its own for each layer and none was given.
        FileNotFoundError: A precision isn't there.
    """
    widths = sorted(there(run, engine) if bits is None else set(bits) - {16}, reverse=True)
    for width in widths:
        if not run.model(width, engine).is_dir():
            raise missing(run, width, engine)
    model = load_exported(run)
    if not model.config.has_theta:
        raise ValueError(
            f"{run.root} has no routers, by its method {model.config.method}: what a token executes goes by no score, "
            "and no precision changes it, so there is nothing to inspect"
        )
    theta = _common_theta(model.config.threshold) if theta is None else theta
    reference = trace(model, texts, theta)
    questions = of([text.ids for text in texts])
    precisions: list[tuple[dict[str, Any], list[Trace]]] = []
    for width in (16, *widths):
        if width != 16:
            model = load_exported(run, width, engine)
        traces = reference if width == 16 else trace(model, texts, theta)
        known: dict[str, Any] = {"bits": width, "engine": "none" if width == 16 else engine}
        if measured:
            forced = reference if width == 16 else trace(model, texts, theta, forced=reference)
            known |= {"theta": theta, "questions": questions} | measure_changes(
                model.config, texts, reference, traces, forced
            )
            _keep(run, cast(Changes, known))
            _say(cast(Changes, known))
        precisions.append((known, traces))
    shown = spread(len(texts), SHOWN)
    content = document(
        run_title(load_results(run.root)),
        model.config,
        theta,
        load_tokenizer(run, run.model()),
        [texts[i] for i in shown],
        [(known, [traces[i] for i in shown]) for known, traces in precisions],
    )
    name = f"{'' if measured else 'text-'}theta-{theta:g}"
    _write(run, f"{name}.json", json.dumps(content, ensure_ascii=False, allow_nan=False))
    return _write(run, f"{name}.html", render_page(content))


def _write(run: RunDirectory, name: str, text: str) -> Path:
    path = run.root / "inspect" / name
    with writing(run.root, path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _common_theta(threshold: float | list[float]) -> float:
    if isinstance(threshold, list):
        raise ValueError("the model has a threshold for each layer: name one for all layers with --theta")
    return threshold


def there(run: RunDirectory, engine: str) -> list[float]:
    """The precisions below 16 bits that an engine has made."""
    if find(engine).holds:
        made = run.quantization_config(4, engine) if run.model(4, engine).is_dir() else None
        return [] if made is None else [*(made.get("held") or [made["bits"]])]
    before, after = run.model(4, engine).name.split("4")
    widths = [
        float(folder.name.removeprefix(before).removesuffix(after))
        for folder in run.root.glob(f"{before}*{after}")
    ]
    return [int(width) if width == int(width) else width for width in widths]


def spread(total: int, count: int) -> list[int]:
    """``count`` of so many places (all of them, where there are no more), evenly: questions stand task after task."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def question_texts(data: CommonsenseDataModule, count: int) -> list[Text]:
    """Validation questions with their gold answers, ``count`` of them evenly from all tasks.

    Raises:
        ValueError: ``count`` isn't positive.
    """
    if count < 1:
        raise ValueError(f"--questions {count} must be positive")
    questions = data.questions("validation")
    chosen = [questions[i] for i in spread(len(questions), count)]
    return [
        Text(q.task, (*q.contexts[q.label], *q.continuations[q.label]), len(q.contexts[q.label]))
        for q in chosen
    ]


def own_texts(run: RunDirectory, texts: Sequence[str]) -> list[Text]:
    """The user's own texts.

    Raises:
        FileNotFoundError: The run has no exported model, whose tokenizer it takes.
        ValueError: A text has no token.
    """
    if not run.model().is_dir():
        raise missing(run)
    tokenizer = load_tokenizer(run, run.model())
    encoded = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    for text, ids in zip(texts, encoded, strict=True):
        if not text.strip() or not ids:
            raise ValueError(f"--text {text!r} is empty: give a text with at least one word")
    return [Text("text", ids, len(ids)) for ids in encoded]


def _keep(run: RunDirectory, row: Changes) -> None:
    """Put a row into results.json, in place of one of the same precision, θ and questions."""
    rows = load_results(run.root).get("changes", [])
    others = [
        known
        for known in rows
        if (known["bits"], known["engine"]) != (row["bits"], row["engine"])
        or not same_theta(known["theta"], row["theta"])
        or known.get("questions", row["questions"]) != row["questions"]
    ]
    order = sorted(
        [*others, row], key=lambda one: (-one["theta"], -one["bits"], one["engine"], -one["examples"])
    )
    update_results(run.root, "changes", order)


def _say(row: Changes) -> None:
    damage = row["nll"] - row["nll_same_decisions"]
    console.print(
        f"{row['bits']:>3g} bits, θ = {row['theta']:g}: {100 * row['execution_ratio']:.1f} % of the layers execute, "
        f"{row['paths']['distinct']:,} paths of {row['tokens']:,} tokens; against 16 bits "
        f"{100 * row['decisions_changed']:.1f} % of the decisions and {100 * row['paths_changed']:.1f} % of the paths "
        f"change (noise would flip {100 * row['flip_ratio']:.1f} %); nll {row['nll']:.3f}, of which {damage:+.3f} ± "
        f"{row['nll_difference_stderr']:.3f} by changed decisions"
    )
