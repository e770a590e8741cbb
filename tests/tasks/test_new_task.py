"""A task that the suite doesn't know, declared in this file alone, from training to its report."""

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qtale_lightning.__main__ import main
from qtale_lightning.data import build_prompt
from qtale_lightning.tasks import SUITES, TASKS, Question, Row, Task, fields, register, wording

PACKAGE = Path(__file__).parents[2] / "qtale_lightning"


def _parse(row: Row) -> Question:
    return Question("opposites", fields.text(row, "word"), tuple(row["offered"]), row["answer"])


def opposites() -> Task:
    """What the opposite of a word is."""
    return Task(
        name="opposites",
        title="Opposites",
        metric="acc",
        rows=24,
        parse=_parse,
        cloze=wording.each_choice(lambda question: f"The opposite of {question.text} is"),
        choice=wording.choice,
    )


@pytest.fixture
def task() -> Iterator[Task]:
    """The task, known while a test runs."""
    yield register(opposites())
    TASKS.pop("opposites")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """24 training and 6 validation rows."""
    (tmp_path / "opposites").mkdir()
    for split, numbers in {"train": range(24), "validation": range(30, 36)}.items():
        made = [{"word": f"up {n}", "offered": [f"down {n}", f"up {n}"], "answer": 0} for n in numbers]
        (tmp_path / "opposites" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, made)))
    return tmp_path


def test_its_prompt(task: Task) -> None:
    question = task.parse({"word": "hot", "offered": ["cold", "warm"], "answer": 0})
    prompt = build_prompt(question, "cloze")
    assert prompt.contexts == ("The opposite of hot is",) * 2
    assert prompt.continuations == (" cold", " warm")
    listed = build_prompt(question, "choice")
    assert listed.contexts[0] == "Question: hot\nA. cold\nB. warm\nAnswer:"


def test_without_its_rows_it_says_what_to_give(
    task: Task, options: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *options(), "--data.tasks", "opposites", "--out", str(tmp_path), "--wandb", "disabled"])
    assert (
        "task 'opposites' has no hub dataset: give its rows by --data.root FOLDER" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_it_runs_from_training_to_the_report(
    task: Task, root: Path, options: Callable[..., list[str]], tmp_path: Path
) -> None:
    more = ("--data.tasks", "opposites", "--data.root", str(root), "--data.batch_size", "8")
    small = ("--data.calibration_rows", "4", "--trainer.max_steps", "2", "--validations", "1")
    quick = ("--quantize.sequences", "32", "--sweep.thresholds", "[0.5,0.1]", "--wandb", "disabled")
    out = tmp_path / "out"
    main(["fit", *options("tiny", "qtale", *more, *small, *quick, "--out", str(out))])
    run = out / "tiny-qtale-opposites-s0"
    main(["report", str(run)])
    page = (run / "results.md").read_text(encoding="utf-8")
    assert "Opposites" in page
    rows = json.loads((run / "results.json").read_text(encoding="utf-8"))["evaluation"]
    validation = [row for row in rows if row["split"] == "validation"]
    assert {row["bits"] for row in validation} == {16, 4, 3}
    assert all(row["accuracy"]["opposites"]["examples"] == 6 for row in validation)


def test_no_other_file_of_the_package_names_a_task() -> None:
    found = {
        f"{file.relative_to(PACKAGE)}:{node.lineno}": node.value
        for file in PACKAGE.rglob("*.py")
        if file.parent.name != "tasks"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in TASKS
    }
    assert found == {}


def test_suites_name_tasks_that_are_there() -> None:
    assert {task for tasks in SUITES.values() for task in tasks} <= set(TASKS)


@pytest.mark.parametrize(("name", "says"), [("piqa", "already"), ("csqa", "already"), ("a,b", "can't name")])
def test_names_that_are_taken_or_no_names_are_refused(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        register(Task(name=name, metric="acc", rows=1, parse=_parse, cloze=wording.cloze))
    with pytest.raises(ValueError, match="no wording"):
        Task(name="other", metric="acc", rows=1, parse=_parse)
    assert "other" not in TASKS
