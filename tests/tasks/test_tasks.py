from typing import Any

import pytest

from qtale_lightning.tasks import SUITES, TASKS, Question, resolve_tasks

Rows = dict[str, dict[str, Any]]
BUILT_IN = {"facts"}


def test_each_task_parses_its_row(rows: Rows) -> None:
    right = {
        "piqa": "wear gloves",
        "boolq": "yes",
        "social_iqa": "hurt",
        "arc_easy": "wood",
        "arc_challenge": "wool",
        "winogrande": "the cup",
        "openbookqa": "iron",
        "facts": "clay",
        "mmlu": "iron",
        "alpaca": "1, 2, 3",
        "samsum": "Ann and Bob will have lunch at noon.",
    }
    assert set(right) == set(TASKS)
    for name, answer in right.items():
        question = TASKS[name].parse(rows[name])
        assert question.task == name
        assert question.choices[question.label] == answer


def test_metrics_are_those_each_task_reports() -> None:
    normalised = {name for name, task in TASKS.items() if task.metric == "acc_norm"}
    assert normalised == {"piqa", "arc_easy", "arc_challenge", "openbookqa"}
    others = {name: task.metric for name, task in TASKS.items() if task.metric not in ("acc", "acc_norm")}
    assert others == {"alpaca": "perplexity", "samsum": "rougeL"}
    assert {name for name, task in TASKS.items() if task.written} == set(others)


def test_mmlu_keeps_its_subject(rows: Rows) -> None:
    assert TASKS["mmlu"].parse(rows["mmlu"]).subject == "high_school_chemistry"
    assert TASKS["mmlu"].parse(rows["mmlu"] | {"subject": ""}).subject == ""  # as in auxiliary_train


def test_alpacas_input_is_context_and_may_be_empty(rows: Rows) -> None:
    assert TASKS["alpaca"].parse(rows["alpaca"]).context == "3, 1, 2"
    assert TASKS["alpaca"].parse(rows["alpaca"] | {"input": " "}).context == ""


def test_samsums_lines_end_alike_in_every_copy(rows: Rows) -> None:
    assert TASKS["samsum"].parse(rows["samsum"]).text == "Ann: Lunch?\nBob: At noon."


@pytest.mark.parametrize(
    ("task", "change", "label", "choices"),
    [
        (
            "arc_easy",
            {"answerKey": "2", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}},
            1,
            3,
        ),
        ("arc_easy", {"answerKey": "E", "choices": {"text": list("vwxyz"), "label": list("ABCDE")}}, 4, 5),
        ("openbookqa", {"answerKey": " C "}, 2, 4),
        ("boolq", {"passage": "Iron is a metal."}, 1, 2),
        ("piqa", {"label": "1"}, 1, 2),
        ("social_iqa", {"label": "3\n"}, 2, 3),
        ("winogrande", {"answer": 2}, 1, 2),
        ("mmlu", {"answer": "D"}, 3, 4),
        ("mmlu", {"answer": "0"}, 0, 4),
    ],
)
def test_hub_variants_parse(rows: Rows, task: str, change: dict[str, Any], label: int, choices: int) -> None:
    question = TASKS[task].parse(rows[task] | change)
    assert (question.label, len(question.choices)) == (label, choices)


def test_boolq_reads_superglue_labels(rows: Rows) -> None:
    del rows["boolq"]["answer"]
    passage = "Iron is a metal."
    question = TASKS["boolq"].parse(rows["boolq"] | {"label": 0, "passage": passage})
    assert question == Question("boolq", "is iron a metal", ("no", "yes"), 0, passage)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("piqa", ("piqa",)),
        ("csqa", SUITES["csqa"]),
        ("piqa,boolq", ("piqa", "boolq")),
        (["boolq", "piqa, boolq"], ("boolq", "piqa")),
        (["facts", "csqa"], ("facts", *SUITES["csqa"])),
        ("generality", ("mmlu", "alpaca", "samsum")),
    ],
)
def test_resolve_tasks(spec: str | list[str], expected: tuple[str, ...]) -> None:
    assert resolve_tasks(spec) == expected


@pytest.mark.parametrize("spec", ["gsm8k", "piqa,", "", []])
def test_unknown_tasks_are_refused_with_the_known_ones(spec: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"csqa.*facts.*winogrande"):
        resolve_tasks(spec)
