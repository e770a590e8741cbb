"""Written answers to a run's validation questions, kept as `<run>/generations/*.jsonl`, one file an evaluation row."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qtale_lightning.data import CommonsenseDataModule
from qtale_lightning.data.tokenization import EncodedPrompt
from qtale_lightning.evaluation.generation import READING, generate, read_answer
from qtale_lightning.evaluation.scoring import Threshold
from qtale_lightning.manifest import writing
from qtale_lightning.models.modeling import RoutedForCausalLM
from qtale_lightning.results.predictions import predictions_file
from qtale_lightning.stages.progress import progress

FOLDER = "generations"


def write_answers(
    data: CommonsenseDataModule,
    model: RoutedForCausalLM,
    threshold: Threshold,
    what: str,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> dict[int, str]:
    """What the model writes to the questions that are to be answered so, by their index among validation questions.

    Args:
        what: Which model at which θ, in words, for the progress bar.
        on_tokens: As of `generate`.

    Raises:
        ValueError: as `generate`.
    """
    questions = data.questions("validation")
    texts: dict[int, str] = {}
    for task, chosen in data.asking.to_generate(questions).items():
        prompts = [questions[index].contexts[0] for index in chosen]
        with progress(f"{what}, writing {task}", len(prompts)) as advance:
            found = generate(
                model,
                data.checked_tokenizer(),
                prompts,
                data.asking.new_tokens(task),
                threshold,
                on_progress=advance,
                on_tokens=on_tokens,
            )
        texts |= dict(zip(chosen, found, strict=True))
    return texts


def writing_protocol(data: CommonsenseDataModule) -> dict[str, Any]:
    """How answers are written and measured; empty where none are."""
    tasks = data.asking.to_generate(data.questions("validation"))
    if not tasks:
        return {}
    metrics = {data.asking.metrics()[task] for task in tasks}
    protocol: dict[str, Any] = {
        "decoding": "greedy",
        "max_new_tokens": {task: data.asking.new_tokens(task) for task in tasks},
        "answers": {task: len(chosen) for task, chosen in tasks.items()},
    }
    if "acc_generated" in metrics:
        protocol["reading"] = READING
    if "rougeL" in metrics:
        protocol["rouge"] = "torchmetrics, F1, no stemming"
    return {"generation": protocol}


def save_answers(
    run_dir: Path,
    row: Mapping[str, Any],
    questions: list[EncodedPrompt],
    texts: Mapping[int, str],
    data: CommonsenseDataModule,
) -> Path | None:
    """Writes the answers of an evaluation row atomically: a line each of task, index, prompt, reference and what was
    generated, and, where choices were given, what was read from it. None where there are no answers."""
    if not texts:
        return None
    tokenizer = data.checked_tokenizer()
    lines = []
    for index, text in sorted(texts.items()):
        question = questions[index]
        names = question.labels or question.choices
        line: dict[str, Any] = {
            "task": question.task,
            "index": index,
            "prompt": tokenizer.decode(list(question.contexts[0]), skip_special_tokens=True),
            "reference": names[question.label],
            "generated": text,
        }
        if len(question.choices) > 1:
            read = read_answer(text, question.labels, question.choices)
            line["read"] = None if read is None else names[read]
        lines.append(json.dumps(line, ensure_ascii=False))
    path = run_dir / FOLDER / predictions_file(run_dir, row).name
    with writing(run_dir, path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
