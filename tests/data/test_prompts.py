from typing import Any

import pytest

from qtale_lightning.data.prompts import PROMPT_STYLES, build_prompt
from qtale_lightning.data.tasks import TASKS, Question

Rows = dict[str, dict[str, Any]]
OPTIONS = "A. iron\nB. wood\nC. wool\nD. clay"

# The wording of lm-evaluation-harness, lm_eval/tasks/<task>.
CLOZE = {
    "piqa": "Question: warm hands\nAnswer:",
    "boolq": "Question: is iron a metal?\nAnswer:",
    "social_iqa": "Q: Kim fell. How does Kim feel?\nA:",
    "arc_easy": "Question: Which burns?\nAnswer:",
    "arc_challenge": "Question: Which comes from sheep?\nAnswer:",
    "openbookqa": "A magnet attracts",
    "facts": "Question: What is a brick made of?\nAnswer:",
}

CHOICE = {
    "piqa": "Question: warm hands\nA. wear gloves\nB. hold ice\nAnswer:",
    "boolq": "Question: is iron a metal?\nA. no\nB. yes\nAnswer:",
    "social_iqa": "Kim fell.\nQuestion: How does Kim feel?\nA. hurt\nB. rich\nC. tall\nAnswer:",
    "arc_easy": f"Question: Which burns?\n{OPTIONS}\nAnswer:",
    "arc_challenge": f"Question: Which comes from sheep?\n{OPTIONS}\nAnswer:",
    "winogrande": (
        "Fill in the blank: The cup fell off the table as _ was light.\nA. the cup\nB. the table\nAnswer:"
    ),
    "openbookqa": f"Question: A magnet attracts\n{OPTIONS}\nAnswer:",
    "facts": f"Question: What is a brick made of?\n{OPTIONS}\nAnswer:",
}


@pytest.mark.parametrize("task", sorted(TASKS))
def test_cloze_scores_each_choice(rows: Rows, task: str) -> None:
    question = TASKS[task].parse(rows[task])
    prompt = build_prompt(question, "cloze")
    if task == "winogrande":
        before = "The cup fell off the table as"
        assert prompt.contexts == (f"{before} the cup", f"{before} the table")
        assert prompt.continuations == (" was light.",) * 2
        assert prompt.choice_lengths == (10, 10)
    else:
        assert set(prompt.contexts) == {CLOZE[task]}
        assert prompt.continuations == tuple(f" {choice}" for choice in question.choices)
        assert prompt.choice_lengths == tuple(len(choice) for choice in question.choices)
    assert len(prompt.contexts) == len(prompt.continuations) == len(question.choices)
    assert (prompt.task, prompt.label) == (task, question.label)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_choice_scores_letters(rows: Rows, task: str) -> None:
    question = TASKS[task].parse(rows[task])
    prompt = build_prompt(question, "choice")
    assert prompt.contexts == (CHOICE[task],) * len(question.choices)
    assert prompt.continuations == (" A", " B", " C", " D")[: len(question.choices)]
    assert prompt.choice_lengths == (1,) * len(question.choices)
    assert prompt.label == question.label


@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_boolq_has_its_passage_and_one_question_mark(rows: Rows, style: str) -> None:
    row = rows["boolq"] | {"passage": "Iron is a metal.", "question": "is iron a metal?"}
    context = build_prompt(TASKS["boolq"].parse(row), style).contexts[0]
    assert context.startswith("Iron is a metal.\nQuestion: is iron a metal?\n")


@pytest.mark.parametrize("sentence", ["Ann ran as _   was late.", "_ was late.", "Ann ran as _was late."])
def test_winogrande_continuations_begin_with_one_space(sentence: str) -> None:
    prompt = build_prompt(Question("winogrande", sentence, ("Ann", "Bob"), 0), "cloze")
    assert prompt.continuations == (" was late.",) * 2
    assert prompt.contexts[1] == sentence.split("_")[0] + "Bob"


def test_length_of_a_choice_is_in_characters() -> None:
    prompt = build_prompt(Question("piqa", "drink", ("café", "tea"), 0), "cloze")
    assert prompt.choice_lengths == (4, 3)


@pytest.mark.parametrize("style", PROMPT_STYLES)
@pytest.mark.parametrize("task", sorted(TASKS))
def test_gold_keeps_the_right_choice_alone(rows: Rows, task: str, style: str) -> None:
    prompt = build_prompt(TASKS[task].parse(rows[task]), style)
    gold = prompt.gold()
    assert gold.contexts == (prompt.contexts[prompt.label],)
    assert gold.continuations == (prompt.continuations[prompt.label],)
    assert gold.choice_lengths == (prompt.choice_lengths[prompt.label],)
    assert gold.label == 0


def test_unknown_styles_and_too_many_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown prompt style 'chat'; known: cloze, choice"):
        build_prompt(Question("piqa", "warm hands", ("wear gloves", "hold ice"), 0), "chat")
    with pytest.raises(ValueError, match="27 choices"):
        build_prompt(Question("arc_easy", "Which?", ("a",) * 27, 0), "choice")
