"""Rows from files and from the hub, and what is said where they are missing or malformed."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset

from qtale_lightning.data.readers import read_hub, read_local
from qtale_lightning.hub.repository import COMMIT, Repository
from qtale_lightning.tasks import SUITES, TASKS

Rows = dict[str, dict[str, Any]]
BUILT_IN = {"facts"}


def write(root: Path, task: str, *lines: str) -> Path:
    path = root / task / "train.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


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
    ("mmlu", {"question": ""}, "question"),
    ("mmlu", {"choices": ["a", "b", "c"]}, "choices"),
    ("mmlu", {"choices": ["a", "b", "c", 4]}, "choices"),
    ("mmlu", {"subject": None}, "subject"),
    ("mmlu", {"answer": 4}, "answer"),
    ("mmlu", {"answer": "E"}, "answer"),
    ("alpaca", {"instruction": " "}, "instruction"),
    ("alpaca", {"input": None}, "input"),
    ("alpaca", {"output": ""}, "output"),
    ("samsum", {"dialogue": None}, "dialogue"),
    ("samsum", {"summary": 1}, "summary"),
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


def test_a_missing_file_of_examples_says_what_it_is_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mmlu/dev\.jsonl holds the examples of --data\.shots"):
        read_local("mmlu", tmp_path, "dev")


def test_missing_and_empty_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"piqa/validation\.jsonl not found.*--data\.root"):
        read_local("piqa", tmp_path, "validation")
    write(tmp_path, "piqa", "")
    with pytest.raises(ValueError, match="no rows for task 'piqa'"):
        read_local("piqa", tmp_path, "train")


Asked = list[tuple[str, str | None, str, str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], Asked]:
    """(the rows that the hub has, what was asked of it)."""
    published: list[Any] = []
    asked: Asked = []

    def read(repository: Repository, config: str | None, split: str) -> Dataset:
        asked.append((repository.name, config, split, repository.revision))
        return Dataset.from_list(published)

    monkeypatch.setattr("qtale_lightning.hub.rows.read_dataset", read)
    return published, asked


@pytest.mark.parametrize("task", sorted(set(TASKS) - BUILT_IN))
def test_hub_rows_go_through_the_same_parser(rows: Rows, task: str, hub: tuple[list[Any], Asked]) -> None:
    published, asked = hub
    published.append(rows[task] | ({"passage": "Iron rusts."} if task == "boolq" else {}))
    assert read_hub(task, "validation") == [TASKS[task].parse(published[0])]
    source = TASKS[task].hub
    assert source is not None
    assert asked == [(source.path, source.config, source.validation, source.revision)]


def test_every_hub_dataset_is_read_at_a_commit() -> None:
    sources = [task.hub for task in TASKS.values() if task.hub is not None]
    assert [source.path for source in sources if not COMMIT.fullmatch(source.revision)] == []


@pytest.mark.parametrize("change", [{"passage": None}, {}])
def test_boolqs_passage_is_required_of_the_hub_but_not_of_a_file(
    rows: Rows, hub: tuple[list[Any], Asked], tmp_path: Path, change: dict[str, Any]
) -> None:
    """Without it, the model would be trained on another task, and nothing would say so."""
    hub[0].append(rows["boolq"] | change)
    with pytest.raises((ConnectionError, ValueError), match="'passage'") as refusal:
        read_hub("boolq", "train")
    assert "google/boolq" in str(refusal.value)
    write(tmp_path, "boolq", json.dumps(rows["boolq"]))
    assert read_local("boolq", tmp_path, "train")[0].context == ""


def test_mmlus_splits_serve_each_its_purpose(rows: Rows, hub: tuple[list[Any], Asked]) -> None:
    published, asked = hub
    published.append(rows["mmlu"])
    for split in ("train", "calibration", "dev", "validation"):
        read_hub("mmlu", split)
    assert [name for _, _, name, _ in asked] == ["auxiliary_train", "validation", "dev", "test"]
    with pytest.raises(ValueError, match="'samsum' has no dev split"):
        read_hub("samsum", "dev")


def test_published_rows_that_are_known_to_be_empty_are_left_out(
    rows: Rows, hub: tuple[list[Any], Asked], tmp_path: Path
) -> None:
    """One of samsum's dialogues is empty on the hub; a local file is taken at its word."""
    empty = rows["samsum"] | {"dialogue": None}
    hub[0][:] = [rows["samsum"], empty]
    assert len(read_hub("samsum", "train")) == 1
    write(tmp_path, "samsum", json.dumps(empty))
    with pytest.raises(ValueError, match=r"train\.jsonl:1: field 'dialogue'"):
        read_local("samsum", tmp_path, "train")


def test_alpacas_validation_rows_are_cut_from_its_training_split(tmp_path: Path) -> None:
    """`datasets` reads the declared slices: no row is in both, and none is lost."""
    path = write(tmp_path, "alpaca", *(json.dumps({"number": number}) for number in range(2005)))
    source = TASKS["alpaca"].hub
    assert source is not None
    train, validation = (
        load_dataset("json", data_files=str(path), split=split, cache_dir=str(tmp_path / "cache"))["number"]
        for split in (source.train, source.validation)
    )
    assert list(train) == list(range(5))
    assert list(validation) == list(range(5, 2005))


def test_built_in_tasks_have_no_hub_dataset() -> None:
    assert {name for name, task in TASKS.items() if task.hub is None} == BUILT_IN
    with pytest.raises(ValueError, match="no hub dataset: its rows are built in"):
        read_hub("facts", "train")


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("task", SUITES["csqa"])
def test_real_rows_parse(real_root: Path, task: str, split: Any) -> None:
    questions = read_local(task, real_root, split)
    lines = (real_root / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(questions) == len(lines)
    assert {question.label for question in questions} >= {0, 1}
