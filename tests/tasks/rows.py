"""One well-formed row of each task."""

from typing import Any

LETTERED = {"text": ["iron", "wood", "wool", "clay"], "label": ["A", "B", "C", "D"]}

ROWS: dict[str, dict[str, Any]] = {
    "piqa": {"goal": "warm hands", "sol1": "wear gloves", "sol2": "hold ice", "label": 0},
    "boolq": {"question": "is iron a metal", "answer": True},
    "social_iqa": {
        "context": "Kim fell.",
        "question": "How does Kim feel?",
        "answerA": "hurt",
        "answerB": "rich",
        "answerC": "tall",
        "label": "1",
    },
    "arc_easy": {"question": "Which burns?", "choices": LETTERED, "answerKey": "B"},
    "arc_challenge": {"question": "Which comes from sheep?", "choices": LETTERED, "answerKey": "C"},
    "winogrande": {
        "sentence": "The cup fell off the table as _ was light.",
        "option1": "the cup",
        "option2": "the table",
        "answer": "1",
    },
    "openbookqa": {"question_stem": "A magnet attracts", "choices": LETTERED, "answerKey": "A"},
    "facts": {"question": "What is a brick made of?", "choices": LETTERED, "answerKey": "D"},
    "mmlu": {
        "question": "Which metal rusts?",
        "subject": "high_school_chemistry",
        "choices": ["gold", "iron", "tin", "lead"],
        "answer": 1,
    },
    "alpaca": {"instruction": "Sort the numbers.", "input": "3, 1, 2", "output": "1, 2, 3"},
    "samsum": {
        "id": "1",
        "dialogue": "Ann: Lunch?\r\nBob: At noon.",
        "summary": "Ann and Bob will have lunch at noon.",
    },
}
