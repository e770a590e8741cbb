"""Task files for lm-evaluation-harness, read back as YAML and JSON Lines; the harness itself reads them in parity/."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtale_lightning.data import CommonsenseDataModule, Prompt
from qtale_lightning.harness import LOCAL, is_local, local_prompts, write_tasks

SHARED = Prompt("arc_easy", ("Question: naïve?\nAnswer:",) * 3, (" a", " bc", " d\te"), 1, (1, 2, 3))
SEVERAL = Prompt("winogrande", ("The cup", "The table"), (" fell.", " fell."), 0, (5, 5))


def read_back(folder: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A task's declaration and its rows."""
    declaration = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    rows = Path(declaration["dataset_kwargs"]["data_files"]["validation"])
    assert rows.is_absolute()
    return declaration, [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]


def asked(declaration: dict[str, Any], row: dict[str, Any]) -> tuple[list[str], list[str], int]:
    """Contexts, continuations and gold of a row, as the harness's documentation says that it reads them."""
    text, choices, target = (row[declaration[f"doc_to_{part}"]] for part in ("text", "choice", "target"))
    space = declaration["target_delimiter"]
    if isinstance(text, int):  # the choices are contexts, and the target is what follows each
        return choices, [space + target] * len(choices), text
    return [text] * len(choices), [space + choice for choice in choices], target


def test_rows_hold_the_prompts(tmp_path: Path) -> None:
    names = write_tasks(tmp_path, {"arc_easy": [SHARED], "winogrande": [SEVERAL]})
    assert names == [f"arc_easy{LOCAL}", f"winogrande{LOCAL}"]
    for name, prompt in zip(names, (SHARED, SEVERAL), strict=True):
        declaration, rows = read_back(tmp_path, name)
        assert declaration["task"] == name
        assert len(rows) == 1
        expected = (list(prompt.contexts), list(prompt.continuations), prompt.label)
        assert asked(declaration, rows[0]) == expected


def test_accuracies_are_those_that_the_harness_defines_alike(tmp_path: Path) -> None:
    """It would normalise winogrande's by the contexts' lengths."""
    names = write_tasks(tmp_path, {"arc_easy": [SHARED], "winogrande": [SEVERAL]})
    metrics = [[m["metric"] for m in read_back(tmp_path, name)[0]["metric_list"]] for name in names]
    assert metrics == [["acc", "acc_norm"], ["acc"]]


def test_which_rows_are_local(tmp_path: Path) -> None:
    local, hub = CommonsenseDataModule("facts", root=str(tmp_path)), CommonsenseDataModule("facts")
    assert is_local(local, "arc_easy")
    assert not is_local(hub, "arc_easy")
    assert is_local(hub, "facts")  # built in
    assert not is_local(local, "hellaswag")  # the harness's own


def test_rows_are_the_evaluation_s_own() -> None:
    """The same questions in the same order as a run scores, so that a limit takes the same ones."""
    data = CommonsenseDataModule("facts", prompt_style="choice", limit_validation=7, seed=3)
    prompts = local_prompts(data, "facts")
    from qtale_lightning.models.sources import load_tokenizer

    data.tokenizer = load_tokenizer("tiny")
    data.setup("fit")
    questions = data.questions("validation")
    assert len(prompts) == len(questions) == 7
    for prompt, question in zip(prompts, questions, strict=True):
        assert prompt.label == question.label
        assert list(question.contexts[0]) == data.tokenizer(prompt.contexts[0])["input_ids"]


def test_tasks_answered_in_writing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'alpaca' is answered in writing"):
        local_prompts(CommonsenseDataModule("facts", root=str(tmp_path)), "alpaca")
