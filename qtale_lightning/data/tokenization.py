"""From prompts to token ids: where the answer begins, what is trained on, and how sequences are batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qtale_lightning.data.prompts import Prompt
from qtale_lightning.tasks import TASKS

if TYPE_CHECKING:  # what is planned and checked doesn't wait for them
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # the label that PyTorch's cross-entropy leaves out


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a `Prompt`: for choice i, `contexts[i]` is read and `continuations[i]` is scored.

    `answer_cut` says that the end of a written answer was left out, since it is too long; for the other attributes see
    `Prompt`.
    """

    task: str
    label: int
    contexts: tuple[tuple[int, ...], ...]
    continuations: tuple[tuple[int, ...], ...]
    choice_lengths: tuple[int, ...]
    choices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    subject: str = ""
    answer_cut: bool = False


@dataclass(frozen=True)
class TrainingExample:
    """One sequence and its labels, both of shape `(T,)`.

    Labels are aligned with `input_ids`, not shifted: -100 on the prompt, the token itself on the answer and
    on the EOS behind it.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Token ids of a context and its continuation, split as lm-evaluation-harness does (`_encode_pair`).

    Both are encoded together, so that the continuation's first token carries its leading space, and are cut
    at the length of the context alone. Spaces at the context's end move to the continuation, but not a line break,
    at which tokenizers split. Special tokens (a BOS) are the tokenizer's default.

    Raises:
        ValueError: The continuation, or the context, has no token.
    """
    if not continuation.strip():
        raise ValueError(f"empty continuation after the context {context[-80:]!r}")
    stripped = context if context.endswith("\n") else context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole_ids = tokenizer(stripped + continuation)["input_ids"]
    context_ids = tokenizer(stripped)["input_ids"]
    continuation_ids = whole_ids[len(context_ids) :]
    if not context_ids or not continuation_ids:
        raise ValueError(
            f"no tokens in the context {context[-80:]!r} or in its continuation {continuation!r}"
        )
    return context_ids, continuation_ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_length: int) -> EncodedPrompt:
    """Encodes every choice of a prompt.

    A context too long loses tokens from its left, but not its BOS, and no examples. A written answer keeps half of
    `max_length` or what its context leaves, whichever is more, and loses the rest at its end.

    Args:
        tokenizer: The model's tokenizer.
        prompt: What to encode.
        max_length: Tokens that a context and its continuation may have together.

    Raises:
        ValueError: A continuation leaves no room for its context, or examples don't fit.
    """
    contexts, continuations, answer_cut = [], [], False
    for context, continuation in zip(prompt.contexts, prompt.continuations, strict=True):
        context_ids, continuation_ids = encode_pair(tokenizer, context, continuation)
        if TASKS[prompt.task].written:
            kept = max(max_length // 2, max_length - len(context_ids))
            answer_cut = len(continuation_ids) > kept
            continuation_ids = continuation_ids[:kept]
        bos = context_ids[:1] if context_ids[0] == tokenizer.bos_token_id else []
        room = max_length - len(continuation_ids) - len(bos)  # for the context after its BOS
        if room < 1:
            raise ValueError(
                f"task {prompt.task!r}: an answer of {len(continuation_ids)} tokens leaves no room for its "
                f"question in {max_length} tokens; raise --data.max_length"
            )
        if prompt.shots and len(context_ids) - len(bos) > room:
            raise ValueError(
                f"task {prompt.task!r}: a question with its {prompt.shots} examples takes "
                f"{len(context_ids) + len(continuation_ids)} tokens, of which {max_length} fit; raise "
                f"--data.max_length, or lower --data.shots"
            )
        contexts.append((*bos, *context_ids[len(bos) :][-room:]))
        continuations.append(tuple(continuation_ids))
    return EncodedPrompt(
        prompt.task,
        prompt.label,
        tuple(contexts),
        tuple(continuations),
        prompt.choice_lengths,
        prompt.choices,
        prompt.labels,
        prompt.subject,
        answer_cut,
    )


def training_example(encoded: EncodedPrompt, eos_id: int) -> TrainingExample:
    """The right choice's sequence, closed by an EOS so that a model learns to stop, unless its end was cut."""
    end = () if encoded.answer_cut else (eos_id,)
    context, answer = encoded.contexts[encoded.label], (*encoded.continuations[encoded.label], *end)
    return TrainingExample(input_ids=(*context, *answer), labels=(*(IGNORE_INDEX for _ in context), *answer))


def collate(examples: Sequence[TrainingExample], pad_id: int) -> dict[str, Tensor]:
    """Right-padded int64 `input_ids`, `attention_mask` (1 = real token) and `labels`, each `(B, T)`."""
    length = max(len(example.input_ids) for example in examples)

    import torch  # here, so that checking the options of prompts doesn't wait for it

    def padded(rows: list[tuple[int, ...]], value: int) -> Tensor:
        return torch.tensor([(*row, *(value,) * (length - len(row))) for row in rows], dtype=torch.int64)

    return {
        "input_ids": padded([example.input_ids for example in examples], pad_id),
        "attention_mask": padded([(1,) * len(example.input_ids) for example in examples], 0),
        "labels": padded([example.labels for example in examples], IGNORE_INDEX),
    }
