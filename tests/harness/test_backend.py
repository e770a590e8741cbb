"""What the calls of lm-evaluation-harness refuse, and the table."""

from pathlib import Path

import pytest

from qtale_lightning.data import Prompt
from qtale_lightning.harness import evaluate_tasks, find_tasks, harness_model, table, write_tasks
from qtale_lightning.models.sources import load_base, load_tokenizer

pytest.importorskip("lm_eval", reason="needs requirements-lm-eval.txt")

PROMPTS = [Prompt("facts", ("Question: wool?\nAnswer:",) * 2, (" sheep", " iron"), 0, (5, 4))] * 3


def test_unknown_tasks_are_named_with_similar_ones(tmp_path: Path) -> None:
    names = write_tasks(tmp_path, {"facts": PROMPTS})
    with pytest.raises(ValueError, match=r"knows no task 'fact_local'.*similar: facts_local"):
        find_tasks([*names, "fact_local"], tmp_path, defaults=False)


def test_rows_that_cannot_be_had_are_said(tmp_path: Path) -> None:
    declared = (
        "task: far\ndataset_path: allenai/ai2_arc\ndataset_name: ARC-Easy\noutput_type: multiple_choice\n"
    )
    (tmp_path / "far.yaml").write_text(declared + "validation_split: validation\n", encoding="utf-8")
    lm = harness_model(load_base("tiny"), load_tokenizer("tiny"), 2)
    with pytest.raises(ConnectionError, match=r"rows of its tasks .far..*--data.root FOLDER"):
        evaluate_tasks(lm, ["far"], find_tasks(["far"], tmp_path, defaults=False))


@pytest.mark.slow
def test_groups_have_a_table_of_their_own(tmp_path: Path) -> None:
    names = write_tasks(tmp_path, {"facts": PROMPTS})
    group = (
        f"group: all\ntask: [{names[0]}]\naggregate_metric_list: [{{metric: acc, weight_by_size: true}}]\n"
    )
    (tmp_path / "all.yaml").write_text(group, encoding="utf-8")
    lm = harness_model(load_base("tiny"), load_tokenizer("tiny"), 2)
    manager = find_tasks(["all", *names], tmp_path, defaults=False)
    assert table(evaluate_tasks(lm, names, manager)).count("Tasks") == 1
    both = table(evaluate_tasks(lm, ["all"], manager, limit=2))
    assert "Groups" in both
    assert "Tasks" in both
