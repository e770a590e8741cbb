from typing import Any

import pytest

from qtale_lightning.data.prompts import CHOICE_LABELS, PROMPT_STYLES, build_prompt
from qtale_lightning.tasks import TASKS, Question

Rows = dict[str, dict[str, Any]]
STYLED = sorted(name for name, task in TASKS.items() if not task.template)
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


@pytest.mark.parametrize("task", STYLED)
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


@pytest.mark.parametrize("task", STYLED)
def test_choice_scores_letters(rows: Rows, task: str) -> None:
    question = TASKS[task].parse(rows[task])
    prompt = build_prompt(question, "choice")
    assert prompt.contexts == (CHOICE[task],) * len(question.choices)
    assert prompt.continuations == (" A", " B", " C", " D")[: len(question.choices)]
    assert prompt.choice_lengths == (1,) * len(question.choices)
    assert prompt.label == question.label
    assert (prompt.labels, prompt.choices) == (
        ("A", "B", "C", "D")[: len(question.choices)],
        question.choices,
    )


@pytest.mark.parametrize("task", STYLED)
def test_choice_scores_numbers(rows: Rows, task: str) -> None:
    question = TASKS[task].parse(rows[task])
    prompt = build_prompt(question, "choice", "numbers")
    expected = CHOICE[task]
    for letter, number in zip("ABCD", "1234", strict=True):
        expected = expected.replace(f"\n{letter}. ", f"\n{number}. ")
    assert expected != CHOICE[task]
    assert prompt.contexts == (expected,) * len(question.choices)
    assert prompt.continuations == (" 1", " 2", " 3", " 4")[: len(question.choices)]
    assert prompt.labels == ("1", "2", "3", "4")[: len(question.choices)]


# Letter for letter what lm-evaluation-harness 0.4 builds from lm_eval/tasks/mmlu/default with num_fewshot 5.
FIVE_SHOTS = """The following are multiple choice questions (with answers) about high school chemistry.

Which is a gas?
A. salt
B. helium
C. sand
D. glass
Answer: B

Which is a salt?
A. NaCl
B. water
C. air
D. oil
Answer: A

Which is an acid?
A. lye
B. milk
C. glass
D. vinegar
Answer: D

What is ice?
A. sand
B. gas
C. water
D. salt
Answer: C

How many protons has hydrogen?
A. 0
B. 1
C. 2
D. 3
Answer: B

Which metal rusts?
A. gold
B. iron
C. tin
D. lead
Answer:"""


def test_mmlu_is_asked_in_the_harness_words(rows: Rows) -> None:
    question = TASKS["mmlu"].parse(rows["mmlu"])
    shots = [
        Question("mmlu", text, tuple(choices.split()), label, subject=question.subject)
        for text, choices, label in (
            ("Which is a gas?", "salt helium sand glass", 1),
            ("Which is a salt?", "NaCl water air oil", 0),
            ("Which is an acid?", "lye milk glass vinegar", 3),
            ("What is ice?", "sand gas water salt", 2),
            ("How many protons has hydrogen?", "0 1 2 3", 1),
        )
    ]
    for style in PROMPT_STYLES:
        prompt = build_prompt(question, style, shots=shots)
        assert prompt.contexts == (FIVE_SHOTS,) * 4
        assert prompt.continuations == (" A", " B", " C", " D")
        assert (prompt.label, prompt.shots, prompt.subject) == (1, 5, "high_school_chemistry")
    header, *_, last = FIVE_SHOTS.split("\n\n")
    assert build_prompt(question, "choice").contexts[0] == f"{header}\n\n{last}"
    numbered = build_prompt(question, "choice", "numbers", shots[:1])
    assert "1. salt\n2. helium\n3. sand\n4. glass\nAnswer: 2\n\n" in numbered.contexts[0]
    assert numbered.continuations == (" 1", " 2", " 3", " 4")


def test_mmlu_without_a_subject_names_none(rows: Rows) -> None:
    context = build_prompt(TASKS["mmlu"].parse(rows["mmlu"] | {"subject": ""}), "choice").contexts[0]
    assert context.startswith("The following are multiple choice questions (with answers).\n\nWhich metal")


# Stanford Alpaca's prompts (tatsu-lab/stanford_alpaca, train.py) and a line break.
ALPACA = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Sort the numbers.

### Response:
"""
ALPACA_WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further \
context. Write a response that appropriately completes the request.

### Instruction:
Sort the numbers.

### Input:
3, 1, 2

### Response:
"""


@pytest.mark.parametrize("style", PROMPT_STYLES)
def test_texts_to_write_have_templates_of_their_own(rows: Rows, style: str) -> None:
    with_input = build_prompt(TASKS["alpaca"].parse(rows["alpaca"]), style)
    assert with_input.contexts == (ALPACA_WITH_INPUT,)
    assert (with_input.continuations, with_input.labels) == (("1, 2, 3",), ())
    without = build_prompt(TASKS["alpaca"].parse(rows["alpaca"] | {"input": ""}), style)
    assert without.contexts == (ALPACA,)
    samsum = build_prompt(TASKS["samsum"].parse(rows["samsum"]), style)
    assert samsum.contexts == ("Summarize this dialog:\nAnn: Lunch?\nBob: At noon.\n---\nSummary:\n",)
    assert samsum.continuations == ("Ann and Bob will have lunch at noon.",)


def test_braces_in_a_row_are_text(rows: Rows) -> None:
    row = rows["alpaca"] | {"instruction": "Explain {input}.", "input": "{}"}
    assert (
        "Explain {input}.\n\n### Input:\n{}" in build_prompt(TASKS["alpaca"].parse(row), "cloze").contexts[0]
    )


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
    assert gold.choices == (prompt.choices[prompt.label],)
    assert gold.labels == (prompt.labels and (prompt.labels[prompt.label],))
    assert gold.label == 0


def test_examples_come_with_their_right_answers() -> None:
    warm, cold = (
        Question("piqa", f"{what} hands", ("wear gloves", "hold ice"), n)
        for n, what in enumerate(("warm", "cold"))
    )
    prompt = build_prompt(warm, "cloze", shots=[cold, warm])
    asked = "Question: cold hands\nAnswer: hold ice\n\nQuestion: warm hands\nAnswer: wear gloves\n\n"
    assert prompt.contexts == (f"{asked}Question: warm hands\nAnswer:",) * 2
    assert (prompt.shots, prompt.continuations) == (2, (" wear gloves", " hold ice"))
    listed = build_prompt(warm, "choice", "numbers", [cold]).contexts[0]
    assert listed.startswith("Question: cold hands\n1. wear gloves\n2. hold ice\nAnswer: 2\n\nQuestion: warm")
    blank = Question("winogrande", "Ann thanked _ for it.", ("Bo", "Cy"), 1)
    filled = build_prompt(blank, "cloze", shots=[blank])
    assert filled.contexts == tuple(f"Ann thanked Cy for it.\n\nAnn thanked {name}" for name in ("Bo", "Cy"))


def test_unknown_styles_and_too_many_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown prompt style 'chat'; known: cloze, choice"):
        build_prompt(Question("piqa", "warm hands", ("wear gloves", "hold ice"), 0), "chat")
    with pytest.raises(ValueError, match="27 choices"):
        build_prompt(Question("arc_easy", "Which?", ("a",) * 27, 0), "choice")
    question = Question("piqa", "warm hands", ("wear gloves", "hold ice"), 0)
    with pytest.raises(ValueError, match="unknown choice labels 'roman'; known: letters, numbers"):
        build_prompt(question, "choice", "roman")
    dialogue = Question("samsum", "Kim: hi", ("Kim greets.",), 0)
    with pytest.raises(ValueError, match="'samsum' takes no examples"):
        build_prompt(dialogue, "choice", shots=[dialogue])
    assert {len(labels) for labels in CHOICE_LABELS.values()} == {26}
