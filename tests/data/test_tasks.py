import json
from pathlib import Path
from typing import Any

import pytest

from qtale_lightning.data.tasks import SUITES, TASKS, Question, read_hub, read_local, resolve_tasks

Rows = dict[str, dict[str, Any]]
BUILT_IN = {"facts"}


def write(root: Path, task: str, *lines: str) -> Path:
    path = root / task / "train.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


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
    }
    assert set(right) == set(TASKS)
    for name, answer in right.items():
        question = TASKS[name].parse(rows[name])
        assert question.task == name
        assert question.choices[question.label] == answer


def test_metrics_are_those_each_task_reports() -> None:
    normalised = {name for name, task in TASKS.items() if task.metric == "acc_norm"}
    assert normalised == {"piqa", "arc_easy", "arc_challenge", "openbookqa"}


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


MALFORMED = [
    ("piqa", {"label": 2}, "label"),
    ("piqa", {"sol2": None}, "sol2"),
    ("piqa", {"goal": "  "}, "goal"),
    ("boolq", {"answer": "yes"}, "answer"),
    ("boolq", {"question": 3}, "question"),
    ("boolq", {"passage": ""}, "passage"),
    ("social_iqa", {"label": "0"}, "label"),
    ("social_iqa", {"answerC": ""}, "answerC"),
    ("social_iqa", {"context": None}, "context"),
    ("arc_easy", {"answerKey": "E"}, "answerKey"),
    ("arc_easy", {"choices": None}, "choices"),
    ("arc_challenge", {"choices": {"text": ["a", "b"], "label": ["A"]}}, "choices.label"),
    ("arc_challenge", {"choices": {"text": ["a", ""], "label": ["A", "B"]}}, "choices.text"),
    ("winogrande", {"sentence": "No blank."}, "sentence"),
    ("winogrande", {"sentence": "Two _ and _ blanks."}, "sentence"),
    ("winogrande", {"sentence": "Nothing comes after _"}, "sentence"),
    ("winogrande", {"answer": ""}, "answer"),
    ("openbookqa", {"question_stem": ""}, "question_stem"),
    ("openbookqa", {"answerKey": None}, "answerKey"),
    ("facts", {"answerKey": "Z"}, "answerKey"),
]


@pytest.mark.parametrize(("task", "change", "field"), MALFORMED)
def test_malformed_rows_are_refused_with_file_line_and_field(
    rows: Rows, tmp_path: Path, task: str, change: dict[str, Any], field: str
) -> None:
    lines = json.dumps(rows[task]), "", json.dumps(rows[task] | change)
    path = write(tmp_path, task, *lines)
    with pytest.raises(ValueError, match=rf"{path}:3: field '{field}'"):
        read_local(task, tmp_path, "train")


def test_every_task_has_a_malformed_case() -> None:
    assert {task for task, _, _ in MALFORMED} == set(TASKS)


@pytest.mark.parametrize("line", ["{", "[1, 2]"])
def test_lines_that_are_no_objects_are_refused(tmp_path: Path, line: str) -> None:
    path = write(tmp_path, "piqa", line)
    with pytest.raises(ValueError, match=f"{path}:1: not a JSON object"):
        read_local("piqa", tmp_path, "train")


def test_local_rows_keep_their_order(rows: Rows, tmp_path: Path) -> None:
    goals = [f"goal {number}" for number in range(5)]
    write(tmp_path, "piqa", *(json.dumps(rows["piqa"] | {"goal": goal}) for goal in goals))
    assert [question.text for question in read_local("piqa", tmp_path, "train")] == goals


def test_missing_and_empty_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"piqa/validation\.jsonl not found.*--data\.root"):
        read_local("piqa", tmp_path, "validation")
    write(tmp_path, "piqa", "")
    with pytest.raises(ValueError, match="no rows for task 'piqa'"):
        read_local("piqa", tmp_path, "train")


@pytest.mark.parametrize("task", sorted(set(TASKS) - BUILT_IN))
def test_hub_rows_go_through_the_same_parser(rows: Rows, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, config: str | None, *, split: str, revision: str | None) -> list[Any]:
        asked.append((path, config, split, revision))
        return [rows[task]]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_hub(task, "validation") == [TASKS[task].parse(rows[task])]
    source = TASKS[task].hub
    assert source is not None
    assert asked == [(source.path, source.config, "validation", None)]


def test_an_unreachable_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **options: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=r"'piqa'.*no route.*--data\.root FOLDER.*facts"):
        read_hub("piqa", "train")


def test_built_in_tasks_have_no_hub_dataset() -> None:
    assert {name for name, task in TASKS.items() if task.hub is None} == BUILT_IN
    with pytest.raises(ValueError, match="built in"):
        read_hub("facts", "train")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("piqa", ("piqa",)),
        ("csqa", SUITES["csqa"]),
        ("piqa,boolq", ("piqa", "boolq")),
        (["boolq", "piqa, boolq"], ("boolq", "piqa")),
        (["facts", "csqa"], ("facts", *SUITES["csqa"])),
    ],
)
def test_resolve_tasks(spec: str | list[str], expected: tuple[str, ...]) -> None:
    assert resolve_tasks(spec) == expected


@pytest.mark.parametrize("spec", ["mmlu", "piqa,", "", []])
def test_unknown_tasks_are_refused_with_the_known_ones(spec: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"csqa.*winogrande.*facts"):
        resolve_tasks(spec)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("task", SUITES["csqa"])
def test_real_rows_parse(real_root: Path, task: str, split: Any) -> None:
    questions = read_local(task, real_root, split)
    lines = (real_root / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(questions) == len(lines)
    assert {question.label for question in questions} >= {0, 1}
