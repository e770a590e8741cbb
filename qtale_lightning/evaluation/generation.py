"""Answers in writing: a model's greedy continuations of prompts, and how a choice is read from one."""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qtale_lightning.batching import by_length
from qtale_lightning.evaluation.scoring import Threshold
from qtale_lightning.models.modeling import RoutedForCausalLM
from qtale_lightning.models.routing import Routing

READING = (
    "first line: a label alone, or a label in brackets or followed by one of . ) : and a space, or one choice's whole "
    "text (case and a final period aside); anything else is unreadable and counts as wrong"
)
_LABEL = re.compile(r"\((\w+)\)(?=\s|$)|(\w+)[.):](?=\s|$)|(\w+)$")


@torch.inference_mode()
def generate(
    model: RoutedForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    threshold: Threshold = None,
    batch_tokens: int | None = None,
    on_progress: Callable[[int], None] = lambda prompts: None,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> list[str]:
    """Greedy continuations of prompts until EOS, by Hugging Face's `generate()`; texts without surrounding space.

    Precision falls as they are written where the model's own generation configuration has a `bits_schedule`.

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
        prompts: Token ids; batched by length with padding on the left, which changes no token beyond what
            floating-point noise does where two tokens are equally likely.
        max_new_tokens: Where a text without an EOS ends.
        threshold: θ; None is the model's own.
        batch_tokens: Tokens (padding and new ones included) of a batch. None: 2048 on a CPU, else 16384.
        on_progress: Called with the number of prompts finished since the last call.
        on_tokens: Called with the number of tokens written since the last call, EOS included.

    Raises:
        ValueError: A prompt and its answer would be longer than the model's context.
    """
    longest = max(map(len, prompts), default=0) + max_new_tokens
    if longest > model.config.max_position_embeddings:
        raise ValueError(
            f"a prompt and {max_new_tokens} new tokens take {longest} tokens, and the model's context has "
            f"{model.config.max_position_embeddings}: lower --data.max_length or --data.max_new_tokens"
        )
    eos = tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=pad
    )
    schedule = getattr(model.generation_config, "bits_schedule", None)
    if schedule is not None:
        greedy.bits_schedule = schedule  # type: ignore[attr-defined]
    texts = [""] * len(prompts)
    batch_tokens = batch_tokens or (2048 if model.device.type == "cpu" else 16384)
    for batch in by_length([len(prompt) + max_new_tokens for prompt in prompts], batch_tokens):
        width = max(len(prompts[i]) for i in batch)
        ids = torch.full((len(batch), width), pad, device=model.device)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        found = _continue(model, ids, mask, greedy, Routing(threshold=threshold))
        for i, new in zip(batch, found, strict=True):
            texts[i] = str(tokenizer.decode(new, skip_special_tokens=True)).strip()
        on_progress(len(batch))
        ended = (found == eos).cumsum(1) - (found == eos).long()  # behind the first EOS nothing is written
        on_tokens(int((ended == 0).sum()))
    return texts


def _continue(
    model: RoutedForCausalLM, ids: Tensor, mask: Tensor, settings: GenerationConfig, routing: Routing
) -> Tensor:
    """New tokens ``(B, new)`` after ``ids`` and ``mask (B, T)``; a model's own sampling settings are left aside."""
    own, model.generation_config = model.generation_config, settings
    try:
        found = model.generate(ids, attention_mask=mask, routing=routing)
    finally:
        model.generation_config = own
    return found[:, ids.shape[1] :]


def read_answer(text: str, labels: Sequence[str], choices: Sequence[str]) -> int | None:
    """Index of the choice that a written answer names, or None where it can't be read: see :data:`READING`.

    A label goes before a text: where choices are numbers and labelled by numbers, the label is what was asked for.

    Args:
        text: What was written.
        labels: The choices' labels, as the prompt shows them.
        choices: Their texts.
    """
    line = text.strip().partition("\n")[0].strip()
    if found := _LABEL.match(line):
        label = next(group for group in found.groups() if group is not None)
        if label in labels:
            return list(labels).index(label)
    named = [i for i, choice in enumerate(choices) if line and _plain(choice) == _plain(line)]
    return named[0] if len(named) == 1 else None


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().casefold()
