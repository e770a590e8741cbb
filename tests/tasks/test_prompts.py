"""Every task's wording, letter for letter as it has been."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from qtale_lightning.data.prompts import build_prompt
from qtale_lightning.tasks import TASKS

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "prompts.json").read_text(encoding="utf-8"))
"""Prompts by "task, row, style, labels, number of examples"; the other row has what is optional, or lacks it."""
OTHER: dict[str, dict[str, Any]] = {
    "boolq": {"passage": "Iron is a metal."},
    "mmlu": {"subject": ""},
    "alpaca": {"input": ""},
}


@pytest.mark.parametrize("case", GOLDEN)
def test_a_prompt_is_letter_for_letter_what_it_was(rows: dict[str, dict[str, Any]], case: str) -> None:
    name, row, style, labels, shots = case.split(", ")
    question = TASKS[name].parse(rows[name] | (OTHER[name] if row == "other row" else {}))
    prompt = build_prompt(question, style, labels, [question] * int(shots.split()[0]))
    assert json.loads(json.dumps(asdict(prompt))) == GOLDEN[case]


def test_every_task_has_golden_prompts() -> None:
    assert {case.split(",")[0] for case in GOLDEN} == set(TASKS)
