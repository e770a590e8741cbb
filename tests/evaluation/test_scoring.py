"""Scoring against full forward passes of every context and continuation alone, in float32."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qtale_lightning.data import EncodedPrompt
from qtale_lightning.evaluation.scoring import score, score_thresholds
from qtale_lightning.finite import NonFiniteError
from qtale_lightning.models import RoutedForCausalLM, Routing, route
from tests.evaluation.architecture import ARCHITECTURE
from tests.llama import llama_config

# Log-likelihoods are sums of up to 7 terms of size ~5 in float32: noise is ~1e-5, a wrong token or decision ~1e-1.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    """Hugging Face's own model."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**ARCHITECTURE)).eval()


@pytest.fixture(scope="module")
def routed(dense: LlamaForCausalLM) -> RoutedForCausalLM:
    """The same weights with random routers whose decisions are mixed."""
    torch.manual_seed(1)
    model = route(copy.deepcopy(dense), llama_config(**ARCHITECTURE, router_width=16, start_layer=1))
    for layer in model.model.layers[1:]:
        nn.init.normal_(layer.router.out.weight, 0.0, 2.0)
        nn.init.zeros_(layer.router.out.bias)
    return model.eval()


def tokens(generator: torch.Generator, low: int, high: int) -> tuple[int, ...]:
    length = int(torch.randint(low, high + 1, (), generator=generator))
    return tuple(torch.randint(0, ARCHITECTURE["vocab_size"], (length,), generator=generator).tolist())


@pytest.fixture(scope="module")
def questions() -> list[EncodedPrompt]:
    """Of 2 to 4 choices; prompts of 1 to 19 tokens, shared by the choices or one a choice; answers of 1 to 7."""
    generator = torch.Generator().manual_seed(2)
    encoded = []
    for number in range(12):
        choices = 2 + number % 3
        contexts = (tokens(generator, 3, 19),) * choices
        if number % 4 == 3:  # as winogrande's
            contexts = tuple(tokens(generator, 3, 19) for _ in range(choices))
        if number == 0:  # fewer tokens than are reserved
            contexts = ((5,),) * choices
        # Every third question's answers are single tokens, which need no pass of their own.
        longest = 1 if number % 3 == 1 else 7
        continuations = tuple(tokens(generator, 1, longest) for _ in range(choices))
        encoded.append(EncodedPrompt("facts", number % choices, contexts, continuations, (4,) * choices))
    return encoded


def alone(logits: torch.Tensor, context: tuple[int, ...], continuation: tuple[int, ...]) -> float:
    """Log-likelihood of a continuation, from logits ``(T, V)`` of its whole sequence."""
    logprobs = logits.double().log_softmax(-1)
    return sum(float(logprobs[len(context) - 1 + i, token]) for i, token in enumerate(continuation))


def masked(
    model: RoutedForCausalLM, ids: tuple[int, ...], threshold: float | list[float]
) -> tuple[torch.Tensor, Routing]:
    """Logits ``(T, V)`` and decisions of one sequence, every layer computed."""
    routing = Routing(threshold=threshold, execution="masked")
    with torch.no_grad():
        logits = model(torch.tensor([ids]), routing=routing, use_cache=False).logits[0]
    return logits, routing


def one_by_one(
    model: RoutedForCausalLM, questions: list[EncodedPrompt], threshold: float | list[float]
) -> list[list[float]]:
    """Log-likelihoods, every choice by a pass of its own."""
    return [
        [
            alone(masked(model, c + a, threshold)[0], c, a)
            for c, a in zip(q.contexts, q.continuations, strict=True)
        ]
        for q in questions
    ]


def differences(found: list[np.ndarray], expected: list[list[float]]) -> float:
    return max(float(np.abs(a - np.array(b)).max()) for a, b in zip(found, expected, strict=True))


def test_threshold_0_scores_as_the_dense_model(
    dense: LlamaForCausalLM, routed: RoutedForCausalLM, questions: list[EncodedPrompt]
) -> None:
    with torch.no_grad():
        expected = [
            [
                alone(dense(torch.tensor([c + a])).logits[0], c, a)
                for c, a in zip(q.contexts, q.continuations, strict=True)
            ]
            for q in questions
        ]
    scores = score(routed, questions, threshold=0.0)
    assert differences(scores.loglikelihoods, expected) < TOLERANCE
    assert scores.execution == [1.0] * 5


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_routed_scores_are_those_of_masked_execution(
    routed: RoutedForCausalLM, questions: list[EncodedPrompt], threshold: float
) -> None:
    expected = one_by_one(routed, questions, threshold)
    scores = score(routed, questions, threshold)
    assert differences(scores.loglikelihoods, expected) < TOLERANCE
    assert all(0.1 < ratio < 0.95 for ratio in scores.execution[1:]), (
        "decisions aren't mixed: nothing is tested"
    )


def test_routing_matters_to_these_questions(
    routed: RoutedForCausalLM, questions: list[EncodedPrompt]
) -> None:
    """Otherwise the comparisons above would pass with decisions ignored."""
    dense, sparse = score(routed, questions, 0.0), score(routed, questions, 0.5)
    assert differences(sparse.loglikelihoods, [list(v) for v in dense.loglikelihoods]) > 0.1


@pytest.mark.parametrize("batch_tokens", [1, 40, 100_000])
def test_batching_changes_nothing(
    routed: RoutedForCausalLM, questions: list[EncodedPrompt], batch_tokens: int
) -> None:
    usual, other = score(routed, questions, 0.5), score(routed, questions, 0.5, batch_tokens)
    assert differences(other.loglikelihoods, [list(v) for v in usual.loglikelihoods]) < TOLERANCE
    assert other.tokens == usual.tokens
    assert other.execution == usual.execution


def test_a_questions_company_changes_nothing(
    routed: RoutedForCausalLM, questions: list[EncodedPrompt]
) -> None:
    together = score(routed, questions, 0.5).loglikelihoods
    apart = [score(routed, [question], 0.5).loglikelihoods[0] for question in questions]
    assert differences(together, [list(v) for v in apart]) < TOLERANCE


def test_execution_is_counted_over_computed_tokens(
    routed: RoutedForCausalLM, questions: list[EncodedPrompt]
) -> None:
    """A prompt counts once, a continuation without its last token, whose prediction nobody asks for."""
    executed, total = torch.zeros(5, dtype=torch.long), 0
    for question in questions:
        for context in dict.fromkeys(question.contexts):
            executed += masked(routed, context, 0.5)[1].executed(5)
            total += len(context)
        for context, answer in zip(question.contexts, question.continuations, strict=True):
            _, routing = masked(routed, context + answer, 0.5)
            inner = slice(len(context), len(context) + len(answer) - 1)
            count = len(answer) - 1
            executed += torch.stack(
                [
                    routing.gates[i][0, inner].sum() if i in routing.gates else torch.tensor(count)
                    for i in range(5)
                ]
            ).long()
            total += count
    scores = score(routed, questions, 0.5)
    assert scores.tokens == total
    assert scores.execution == pytest.approx((executed / total).tolist(), abs=1e-6)  # float32 division


def test_the_models_own_threshold_is_the_default(
    routed: RoutedForCausalLM, questions: list[EncodedPrompt]
) -> None:
    model = copy.deepcopy(routed)
    model.config.threshold = 0.3
    assert score(model, questions).execution == score(routed, questions, 0.3).execution
    assert score(model, questions).execution != score(routed, questions, 0.5).execution


def test_progress_counts_every_question_once(
    routed: RoutedForCausalLM, questions: list[EncodedPrompt]
) -> None:
    counts: list[int] = []
    score(routed, questions, 0.5, batch_tokens=60, on_progress=counts.append)
    assert sum(counts) == len(questions)
    assert len(counts) > 1


# -------------------------------------------------------------------------------------------- several thresholds

GRID = [0.5, 0.3, 0.05, 0.0]
BY_LAYER = [[0.5, 0.3, 0.5, 0.7], [0.5, 0.3, 0.5, 0.2], [0.5, 0.3, 0.4, 0.5], [0.1, 0.3, 0.5, 0.7]]


class Calls:
    """How many sequences' batches went through each layer's feed-forward part, while it is entered."""

    def __init__(self, model: RoutedForCausalLM) -> None:
        self.by_layer = [0] * len(model.model.layers)
        self.handles = [
            layer.mlp.register_forward_hook(lambda *_, i=index: self.count(i))
            for index, layer in enumerate(model.model.layers)
        ]

    def count(self, layer: int) -> None:
        self.by_layer[layer] += 1

    def close(self) -> list[int]:
        for handle in self.handles:
            handle.remove()
        return self.by_layer


@pytest.mark.parametrize(
    "thresholds",
    [GRID, BY_LAYER, [*GRID, *BY_LAYER], [0.5, 0.5], [0.3]],
    ids=["grid", "by layer", "both", "twice the same", "one"],
)
def test_scoring_together_is_scoring_apart(
    routed: RoutedForCausalLM, questions: list[EncodedPrompt], thresholds: list[Any]
) -> None:
    """Exactly: the same products of the same shapes. In 3 batches, so that each θ is first, middle and last."""
    together = score_thresholds(routed, questions, thresholds, batch_tokens=300)
    for threshold, found in zip(thresholds, together, strict=True):
        alone = score(routed, questions, threshold, batch_tokens=300)
        assert all(map(np.array_equal, found.loglikelihoods, alone.loglikelihoods))
        assert found.execution == alone.execution
        assert found.tokens == alone.tokens


def test_thresholds_differ_in_what_they_score(
    routed: RoutedForCausalLM, questions: list[EncodedPrompt]
) -> None:
    """Otherwise the test above would pass where only one of them is scored."""
    likelihoods = [
        np.concatenate(found.loglikelihoods)
        for found in score_thresholds(routed, questions, [*GRID, *BY_LAYER])
    ]
    for i, one in enumerate(likelihoods):
        assert all(np.abs(one - other).max() > 0.01 for other in likelihoods[:i])


def test_layers_before_the_first_router_are_computed_once(
    routed: RoutedForCausalLM, questions: list[EncodedPrompt]
) -> None:
    calls = Calls(routed)
    score_thresholds(routed, questions, GRID, batch_tokens=100_000)
    assert calls.close() == [1, 4, 4, 4, 4]
    calls = Calls(routed)
    score_thresholds(routed, questions, GRID, batch_tokens=300)
    counted = calls.close()
    assert counted[0] > 1, "several batches"
    assert counted[1:] == [4 * counted[0]] * 4


def test_the_more_first_layers_have_the_same_threshold_the_fewer_are_computed(
    routed: RoutedForCausalLM, questions: list[EncodedPrompt]
) -> None:
    """θ of single layers, from the last layer to the first: half of a layer's passes on average."""
    moved = [[0.5] * layer + [0.2] + [0.5] * (3 - layer) for layer in (3, 2, 1, 0)]
    calls = Calls(routed)
    score_thresholds(routed, questions, [0.5, *moved], batch_tokens=100_000)
    assert calls.close() == [1, 2, 3, 4, 5]


def test_time_is_shared_and_adds_up(
    routed: RoutedForCausalLM, questions: list[EncodedPrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that counts layers: what comes first pays for what is shared, and each θ is first in turn."""
    calls = Calls(routed)
    monkeypatch.setattr("time.perf_counter", lambda: float(sum(calls.by_layer)))
    scores = score_thresholds(routed, questions, [0.5, 0.3, 0.1], batch_tokens=1)
    counted = calls.close()
    assert sum(found.seconds for found in scores) == sum(counted)
    assert len({found.seconds for found in scores}) == 1
    assert counted[0] == 12, "a batch a question, of which there are 4 for each θ"


@pytest.mark.parametrize("threshold", BY_LAYER)
def test_scores_by_layer_are_those_of_masked_execution(
    routed: RoutedForCausalLM, questions: list[EncodedPrompt], threshold: list[float]
) -> None:
    expected = one_by_one(routed, questions, threshold)
    assert differences(score(routed, questions, threshold).loglikelihoods, expected) < TOLERANCE


def test_one_threshold_for_each_layer_or_the_same_for_all(
    routed: RoutedForCausalLM, questions: list[EncodedPrompt]
) -> None:
    one, each = score(routed, questions, 0.3), score(routed, questions, [0.3] * 4)
    assert one.execution == each.execution
    assert all(map(np.array_equal, one.loglikelihoods, each.loglikelihoods))


def test_each_pass_can_be_observed(routed: RoutedForCausalLM, questions: list[EncodedPrompt]) -> None:
    seen: list[tuple[Any, int]] = []
    score_thresholds(
        routed, questions, [0.5, 0.3], observe=lambda r: seen.append((r.threshold, len(r.logits)))
    )
    assert {threshold for threshold, _ in seen} == {0.5, 0.3}
    assert all(layers == 4 for _, layers in seen), "logits of all routed layers"


def test_scores_that_arent_finite_are_refused(
    routed: RoutedForCausalLM, questions: list[EncodedPrompt]
) -> None:
    """The largest of NaN is the first: a damaged model would have an accuracy like another."""
    damaged = copy.deepcopy(routed)
    with torch.no_grad():
        damaged.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(
        NonFiniteError, match=r"log-likelihoods aren't finite \(θ = 0.0, a question of facts\)"
    ):
        score(damaged, questions, 0.0)
