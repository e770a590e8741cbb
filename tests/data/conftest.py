"""Rows in every task's fields, and a small byte-level tokenizer."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qtale_lightning.data import facts_corpus

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


@pytest.fixture
def rows() -> dict[str, dict[str, Any]]:
    """One well-formed row of each task, by task name; copies, so that a test may break them."""
    return {task: dict(row) for task, row in ROWS.items()}


def train_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    tokenizer.train_from_iterator(
        facts_corpus()[::8],
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without a BOS of its own accord."""
    return train_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokenizer, but one that begins every text with a BOS."""
    tokenizer = train_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer
