"""Task files with which lm-evaluation-harness reads our questions: the prompts of `data.prompts`, ready to score.

A row holds what the harness is to ask, so that the wording is written once and any prompt style can be evaluated. The
cloze prompts of the commonsense tasks are letter for letter those of the harness's own task files, except where a row
has no passage that the harness's file needs, or a question already ends in "?", which the harness doubles.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qtale_lightning.data import CommonsenseDataModule, Prompt, build_prompt
from qtale_lightning.data.splits import Examples, task_rows
from qtale_lightning.tasks import TASKS

# What the name of a task gains: figures on local rows aren't those of the harness's task of the same name.
LOCAL = "_local"


def is_local(data: CommonsenseDataModule, task: str) -> bool:
    """Whether a task's rows are local: from the data's root, or built in."""
    return task in TASKS and (data.root is not None or TASKS[task].generate is not None)


def local_prompts(data: CommonsenseDataModule, task: str) -> list[Prompt]:
    """A task's validation questions, asked as the run's own evaluation asks them, and in its order.

    Raises:
        ValueError: The task has no choices to score, or as `task_rows` and `build_prompt`.
        FileNotFoundError: Its files aren't there.
    """
    if TASKS[task].written:
        raise ValueError(
            f"task {task!r} is answered in writing: the harness gets local rows of tasks with choices only"
        )
    asking = data.asking
    rows = task_rows(task, data.root, data.seed, data.calibration_rows, None, data.limit_validation)
    examples = Examples(task, data.root, asking.shots)
    return [
        build_prompt(question, asking.prompt_style, asking.choice_labels, examples.of(question))
        for question in rows.validation
    ]


def write_tasks(folder: Path, prompts: Mapping[str, Sequence[Prompt]]) -> list[str]:
    """Write ``<task>_local.yaml`` and its rows for each task; return the names by which the harness knows them.

    The accuracies are ``acc``, and ``acc_norm`` where the choices are what is scored: where they stand in the
    context the harness would divide by the contexts' lengths, and its own task has no
    ``acc_norm`` either.

    Args:
        folder: An existing folder; the harness's copy of the rows goes there, too.
        prompts: Of each task, at least one, in the order in which the harness is to see them.
    """
    names = []
    for task, asked in prompts.items():
        name = f"{task}{LOCAL}"
        rows, read_as = _shared(asked) if _one_context(asked) else _several(asked)
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        declaration = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"validation": str(file.resolve())},
                "cache_dir": str((folder / "cache").resolve()),
            },
            "validation_split": "validation",
            "output_type": "multiple_choice",
            "target_delimiter": " ",
            "num_fewshot": 0,
            **read_as,
            "metadata": {"version": 1.0},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(declaration, sort_keys=False), encoding="utf-8")
        names.append(name)
    return names


def _one_context(prompts: Sequence[Prompt]) -> bool:
    return all(len(set(prompt.contexts)) == 1 for prompt in prompts)


def _shared(prompts: Sequence[Prompt]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows, and how the harness reads them, where one context has several continuations."""
    rows = [
        {"text": prompt.contexts[0], "choices": _without_space(prompt), "gold": prompt.label}
        for prompt in prompts
    ]
    return rows, _fields("text", "choices", "gold", ("acc", "acc_norm"))


def _several(prompts: Sequence[Prompt]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The same for contexts that have one continuation: the harness takes an index for its text, then."""
    rows = [
        {"contexts": list(prompt.contexts), "continuation": _without_space(prompt)[0], "gold": prompt.label}
        for prompt in prompts
    ]
    return rows, _fields("gold", "contexts", "continuation", ("acc",))


def _without_space(prompt: Prompt) -> list[str]:
    """Continuations without the leading space, which the harness puts there itself."""
    return [continuation.removeprefix(" ") for continuation in prompt.continuations]


def _fields(text: str, choices: str, target: str, metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "doc_to_text": text,
        "doc_to_choice": choices,
        "doc_to_target": target,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics
        ],
    }
