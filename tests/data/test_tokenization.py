from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from qtale_lightning.data.prompts import PROMPT_STYLES, Prompt, build_prompt
from qtale_lightning.data.readers import read_local
from qtale_lightning.data.tokenization import (
    EncodedPrompt,
    TrainingExample,
    collate,
    encode_pair,
    encode_prompt,
    training_example,
)
from qtale_lightning.tasks import SUITES, TASKS, Question

Rows = dict[str, dict[str, Any]]
CONTEXT = "Question: What colour is milk?\nAnswer:"


def assert_boundaries(tokenizer: PreTrainedTokenizerFast, prompt: Prompt, encoded: EncodedPrompt) -> None:
    """The answer's tokens spell the answer with its space, and the question's tokens everything before it."""
    assert len(encoded.contexts) == len(encoded.continuations) == len(prompt.contexts)
    for choice in range(len(prompt.contexts)):
        context = prompt.contexts[choice]
        kept = context if context.endswith("\n") else context.rstrip()
        assert tokenizer.decode(encoded.contexts[choice]) == kept
        spaces = context[len(kept) :]
        assert tokenizer.decode(encoded.continuations[choice]) == spaces + prompt.continuations[choice]


@pytest.mark.parametrize("style", PROMPT_STYLES)
@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_answer_begins_where_it_should(
    rows: Rows, tokenizer: PreTrainedTokenizerFast, task: str, style: str
) -> None:
    prompt = build_prompt(TASKS[task].parse(rows[task]), style)
    assert_boundaries(tokenizer, prompt, encode_prompt(tokenizer, prompt, max_length=512))


@pytest.mark.parametrize("style", PROMPT_STYLES)
@pytest.mark.parametrize("task", SUITES["csqa"])
def test_the_answer_begins_where_it_should_in_real_rows(
    real_root: Path, tokenizer: PreTrainedTokenizerFast, task: str, style: str
) -> None:
    for question in read_local(task, real_root, "validation")[:100]:
        prompt = build_prompt(question, style)
        assert_boundaries(tokenizer, prompt, encode_prompt(tokenizer, prompt, max_length=4096))


def test_context_and_continuation_are_encoded_together(tokenizer: PreTrainedTokenizerFast) -> None:
    context, continuation = encode_pair(tokenizer, CONTEXT, " white")
    assert context + continuation == tokenizer(CONTEXT + " white")["input_ids"]


def test_spaces_at_the_end_of_a_context_move_to_the_continuation(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_pair(tokenizer, f"{CONTEXT} ", "white") == encode_pair(tokenizer, CONTEXT, " white")


def test_bos_is_the_tokenizers_default(
    tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    plain, plain_answer = encode_pair(tokenizer, CONTEXT, " white")
    context, answer = encode_pair(bos_tokenizer, CONTEXT, " white")
    assert context == [bos_tokenizer.bos_token_id, *plain]
    assert answer == plain_answer


@pytest.mark.parametrize("continuation", ["", " "])
def test_empty_continuations_are_refused(tokenizer: PreTrainedTokenizerFast, continuation: str) -> None:
    with pytest.raises(ValueError, match="empty continuation"):
        encode_pair(tokenizer, CONTEXT, continuation)


def test_empty_contexts_need_a_bos(
    tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="no tokens in the context"):
        encode_pair(tokenizer, "", " white")
    assert encode_pair(bos_tokenizer, "", " white")[0] == [bos_tokenizer.bos_token_id]


def test_long_contexts_are_cut_at_their_left(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Prompt("facts", (CONTEXT,) * 2, (" white", " sweeping the floor"), 0, (5, 18))
    whole = encode_prompt(tokenizer, prompt, 512)
    limit = 12
    cut = encode_prompt(tokenizer, prompt, limit)
    assert cut.continuations == whole.continuations
    for choice in range(2):
        kept = limit - len(whole.continuations[choice])
        assert cut.contexts[choice] == whole.contexts[choice][-kept:]


def test_cutting_keeps_the_bos(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Prompt("facts", (CONTEXT,), (" white",), 0, (5,))
    whole = encode_prompt(bos_tokenizer, prompt, 512)
    limit = len(whole.contexts[0]) + len(whole.continuations[0]) - 3
    cut = encode_prompt(bos_tokenizer, prompt, limit)
    assert cut.contexts[0] == (bos_tokenizer.bos_token_id, *whole.contexts[0][4:])


def test_answers_without_room_for_a_question_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Prompt("facts", (CONTEXT,), (" sweeping the floor",), 0, (18,))
    length = len(encode_prompt(tokenizer, prompt, 512).continuations[0])
    assert len(encode_prompt(tokenizer, prompt, length + 1).contexts[0]) == 1
    with pytest.raises(ValueError, match=r"'facts'.*--data\.max_length"):
        encode_prompt(tokenizer, prompt, length)


@pytest.mark.parametrize("answer", ['"Quoted," he said.', "(in brackets)", ": colon", "\n\nlate", " early"])
def test_a_line_break_parts_context_and_written_answer(
    tokenizer: PreTrainedTokenizerFast, answer: str
) -> None:
    """Punctuation that opens an answer would melt with the colon of "Response:", and be lost to it."""
    prompt = build_prompt(Question("alpaca", "Say it.", (answer,), 0), "cloze")
    encoded = encode_prompt(tokenizer, prompt, 512)
    assert tokenizer.decode(encoded.contexts[0]).endswith("### Response:\n")
    assert tokenizer.decode(encoded.continuations[0]) == answer


def written(context: int, answer: int) -> Prompt:
    """A task to write with a context of about so many tokens."""
    text = build_prompt(Question("samsum", "a " * context, ("b " * answer,), 0), "cloze")
    return replace(text, contexts=("a " * context + "\n",))


def test_a_written_answer_too_long_loses_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode_prompt(tokenizer, written(10, 60), 512)
    cut = encode_prompt(tokenizer, written(10, 60), 40)
    assert (whole.answer_cut, cut.answer_cut) == (False, True)
    assert cut.contexts == whole.contexts  # a context that leaves the answer half is kept
    assert cut.continuations[0] == whole.continuations[0][: 40 - len(whole.contexts[0])]
    assert training_example(whole, eos_id=1).labels[-1] == 1
    assert training_example(cut, eos_id=1).labels[-1] == cut.continuations[0][-1]  # it isn't where one stops


def test_a_long_context_leaves_a_written_answer_half(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode_prompt(tokenizer, written(100, 60), 512)
    cut = encode_prompt(tokenizer, written(100, 60), 40)
    assert cut.continuations[0] == whole.continuations[0][:20]
    assert cut.contexts[0] == whole.contexts[0][-20:]
    short = encode_prompt(tokenizer, written(100, 5), 40)
    assert not short.answer_cut
    assert len(short.contexts[0]) + len(short.continuations[0]) == 40


def test_examples_are_never_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    question = Question("mmlu", "Which?", ("a", "b", "c", "d"), 0, subject="anatomy")
    prompt = build_prompt(question, "choice", shots=[replace(question, text="What?")])
    whole = encode_prompt(tokenizer, prompt, 512)
    length = len(whole.contexts[0]) + max(map(len, whole.continuations))
    assert encode_prompt(tokenizer, prompt, length) == whole
    with pytest.raises(ValueError, match=rf"1 examples takes {length} tokens, of which {length - 1} fit"):
        encode_prompt(tokenizer, prompt, length - 1)


def test_what_a_written_answer_is_read_by_is_kept(rows: Rows, tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = encode_prompt(
        tokenizer, build_prompt(TASKS["mmlu"].parse(rows["mmlu"]), "choice", "numbers"), 512
    )
    assert encoded.labels == ("1", "2", "3", "4")
    assert encoded.choices == ("gold", "iron", "tin", "lead")
    assert encoded.subject == "high_school_chemistry"


def test_training_reads_the_prompt_and_learns_the_answer_and_to_stop() -> None:
    encoded = EncodedPrompt("facts", 1, ((5, 6), (5, 6, 7)), ((8,), (9, 10)), (1, 2))
    example = training_example(encoded, eos_id=1)
    assert example.input_ids == (5, 6, 7, 9, 10, 1)
    assert example.labels == (-100, -100, -100, 9, 10, 1)


def test_collate_pads_to_the_right() -> None:
    batch = collate([TrainingExample((5, 6, 1), (-100, 6, 1)), TrainingExample((7, 1), (-100, 1))], pad_id=2)
    expected = {
        "input_ids": [[5, 6, 1], [7, 1, 2]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 6, 1], [-100, 1, -100]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
