"""Perplexity against Hugging Face's loss, its error and ROUGE by hand."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qtale_lightning.data import EncodedPrompt
from qtale_lightning.evaluation.scoring import score
from qtale_lightning.evaluation.text import nll_per_token, rouge, text_measures
from qtale_lightning.models import route
from tests.llama import llama_config

ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "initializer_range": 0.2,
}


def asked(contexts: list[int], answers: list[int]) -> list[EncodedPrompt]:
    """Random token ids of these lengths."""
    generator = torch.Generator().manual_seed(5)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 97, (length,), generator=generator).tolist())

    return [
        EncodedPrompt("alpaca", 0, (ids(context),), (ids(answer),), (answer,), ("a",))
        for context, answer in zip(contexts, answers, strict=True)
    ]


def test_perplexity_is_hugging_faces_loss_on_the_same_tokens() -> None:
    """Its mean loss over a batch is total nll over total answer tokens: exactly what perplexity is made of."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE)).eval()
    model = route(copy.deepcopy(dense), llama_config(**ARCHITECTURE, router_width=8)).eval()
    questions = asked([7, 3, 12, 5], [4, 9, 1, 15])
    length = max(len(q.contexts[0]) + len(q.continuations[0]) for q in questions)
    ids, labels = torch.zeros(4, length, dtype=torch.long), torch.full((4, length), -100)
    mask = torch.zeros_like(ids)
    for row, question in enumerate(questions):
        context, answer = question.contexts[0], question.continuations[0]
        ids[row, : len(context) + len(answer)] = torch.tensor(context + answer)
        mask[row, : len(context) + len(answer)] = 1
        labels[row, len(context) : len(context) + len(answer)] = torch.tensor(answer)
    with torch.inference_mode():
        loss = float(dense(ids, attention_mask=mask, labels=labels).loss)
    measures = text_measures(questions, score(model, questions, 0.0).loglikelihoods, "perplexity")
    # float32 noise of a mean of 29 terms of size ~5: ~1e-6; a token too many or too few: ~1e-1.
    assert measures["nll"] == pytest.approx(loss, abs=1e-5)
    assert measures["value"] == measures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert measures["tokens"] == 4 + 9 + 1 + 15


def test_long_answers_weigh_by_their_tokens() -> None:
    measures = text_measures(asked([3, 3], [1, 3]), [np.array([-1.0]), np.array([-9.0])], "perplexity")
    assert measures["nll"] == 10 / 4  # the mean over rows would be (1 + 3) / 2
    assert measures["value"] == pytest.approx(math.exp(2.5))
    # Residuals 1 - 2.5 and 9 - 7.5: √(2 · (2.25 + 2.25)) / 4 = 3/4; times e^2.5 for the perplexity.
    assert measures["nll_stderr"] == pytest.approx(0.75)
    assert measures["stderr"] == pytest.approx(0.75 * math.exp(2.5))
    assert (measures["metric"], measures["examples"]) == ("perplexity", 2)


def test_the_error_is_that_of_the_bootstrap() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(5, 200, 400)
    nlls = tokens * random.gamma(4.0, 0.5, 400)
    resampled = random.integers(0, 400, (4000, 400))
    bootstrap = (nlls[resampled].sum(1) / tokens[resampled].sum(1)).std()
    # 4,000 resamples estimate a standard deviation to 1 %, the delta method is off by about 1/400.
    assert nll_per_token(nlls, tokens)[1] == pytest.approx(bootstrap, rel=0.04)
    assert nll_per_token(nlls[:1], tokens[:1]) == (nlls[0] / tokens[0], 0.0)


def f1(common: int, written: int, reference: int) -> float:
    precision, recall = common / written, common / reference
    return 2 * precision * recall / (precision + recall)


def test_rouge_by_hand() -> None:
    """Six words against seven: five in common, two pairs, and "ann and will lunch noon" as longest common order."""
    text, reference = "Ann and Bob will lunch noon", "Ann and Bill will have lunch: noon"
    found = rouge([text], [reference])
    expected = {"rouge1": f1(5, 6, 7), "rouge2": f1(2, 5, 6), "rougeL": f1(5, 6, 7)}
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    assert rouge(["noon lunch ann"], [reference])["rougeL"] == pytest.approx(f1(1, 3, 7), abs=1e-6)


def test_rouge_is_a_mean_over_texts_with_its_error() -> None:
    found = rouge(["a b c d", "x y", ""], ["a b c d", "a b", "a b"])
    assert found["rouge1"] == found["rougeL"] == pytest.approx(1 / 3)
    # Values 1, 0, 0: variance (n - 1) 1/3, so √(1/3 / 3).
    assert found["rougeL_stderr"] == pytest.approx(1 / 3)


def test_the_reported_measure_of_written_texts() -> None:
    questions = asked([3, 3], [2, 2])
    scores = [np.array([-2.0]), np.array([-2.0])]
    measures = text_measures(questions, scores, "rougeL", ["a", "b"])  # every reference is "a"
    assert (measures["metric"], measures["value"]) == ("rougeL", 0.5)
    assert measures["stderr"] == measures["rougeL_stderr"] == pytest.approx(0.5)
    assert measures["perplexity"] == pytest.approx(math.e)
