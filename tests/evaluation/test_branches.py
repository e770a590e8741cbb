"""Which prompts are computed together, and that doing so changes no score."""

import pytest

from qtale_lightning.data import EncodedPrompt
from qtale_lightning.evaluation import branches
from qtale_lightning.evaluation.branches import Tree, computed_tokens, trees
from qtale_lightning.evaluation.scoring import score, score_thresholds
from qtale_lightning.models import RoutedForCausalLM
from tests.evaluation.test_scoring import TOLERANCE, dense, differences, one_by_one, routed

__all__ = ["dense", "routed"]  # fixtures

EXAMPLES = tuple(range(10, 40))


def asked(*contexts: tuple[int, ...], answers: int = 2) -> EncodedPrompt:
    """A question; its answers have 1 token, 2 tokens, …"""
    if len(contexts) == 1:
        contexts *= answers
    continuations = tuple(tuple(range(50, 51 + n)) for n in range(len(contexts)))
    return EncodedPrompt("facts", 0, contexts, continuations, (1,) * len(contexts))


@pytest.fixture
def few_shot() -> list[EncodedPrompt]:
    """Questions of 3 to 8 tokens behind the same 30, one of them twice, and one that shares nothing."""
    questions = [asked((*EXAMPLES, *range(60 + n, 63 + 2 * n)), answers=2 + n % 3) for n in range(6)]
    filled = asked((*EXAMPLES, 5, 6, 7), (*EXAMPLES, 5, 8))  # as winogrande's: a context for each choice
    return [*questions, asked((1, 2, 3, 4)), questions[2], filled]


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_what_is_shared_changes_no_score(
    routed: RoutedForCausalLM, few_shot: list[EncodedPrompt], threshold: float
) -> None:
    expected = one_by_one(routed, few_shot, threshold)
    assert differences(score(routed, few_shot, threshold).loglikelihoods, expected) < TOLERANCE


def test_what_is_shared_is_computed_once(routed: RoutedForCausalLM, few_shot: list[EncodedPrompt]) -> None:
    found = trees(few_shot)
    together, single = sorted(found, key=lambda tree: -tree.size)
    assert (len(together.prompts), together.shared, single.shared) == (8, 30, 3)
    distinct = {context for question in few_shot for context in question.contexts if len(context) > 4}
    answers = sum(len(answer) - 1 for question in few_shot for answer in question.continuations)
    assert together.size + single.size == 30 + sum(len(prompt) - 30 for prompt in distinct) + 4 + answers
    assert score(routed, few_shot).tokens == together.size + single.size


@pytest.mark.parametrize("reserved", [1, 2, 3, 5, 31, 60])
def test_reserved_tokens_are_counted_as_the_model_does(
    routed: RoutedForCausalLM,
    few_shot: list[EncodedPrompt],
    reserved: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that what can't be reached by skipping is known without a model."""
    questions = [*few_shot, asked((1,), answers=3)]
    free = []
    monkeypatch.setattr(routed.config, "reserved_tokens", reserved)
    score_thresholds(routed, questions, [0.5], observe=lambda routing: free.append(int(routing.free.sum())))
    tokens, first = computed_tokens(questions, reserved)
    assert tokens == score(routed, questions).tokens
    assert tokens - first == sum(free)


def test_a_short_beginning_is_not_worth_a_tree() -> None:
    """As "Question:" is: each would attend to the others in vain."""
    questions = [asked((1, 2, *range(n, n + 3))) for n in (10, 20, 30)]
    assert [tree.shared for tree in trees(questions)] == [4, 4, 4]
    closer = [asked((1, 2, 3, *range(n, n + 3))) for n in (10, 20, 30)]
    assert [tree.shared for tree in trees(closer)] == [3]


def test_a_tree_stays_within_its_tokens(
    monkeypatch: pytest.MonkeyPatch, routed: RoutedForCausalLM, few_shot: list[EncodedPrompt]
) -> None:
    whole = score(routed, few_shot, 0.5)
    monkeypatch.setattr(branches, "TREE_TOKENS", 50)
    found = trees(few_shot)
    assert len(found) > 2
    assert all(tree.size <= 50 or len(tree.prompts) == 1 for tree in found)
    again = score(routed, few_shot, 0.5)
    assert again.tokens > whole.tokens
    assert differences(again.loglikelihoods, [list(v) for v in whole.loglikelihoods]) < TOLERANCE


def test_every_pair_is_in_one_tree(few_shot: list[EncodedPrompt]) -> None:
    pairs = [pair for tree in trees(few_shot) for found in tree.prompts.values() for pair in found]
    assert sorted(pairs) == [(q, c) for q, one in enumerate(few_shot) for c in range(len(one.contexts))]


def test_a_prompt_that_begins_another_one() -> None:
    tree = Tree.of([asked((1, 2, 3)), asked((1, 2, 3, 4))], [0, 1])
    assert (tree.shared, tree.size) == (2, 2 + 1 + 2 + 2)
