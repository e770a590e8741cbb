"""Traces against forward passes of every text alone in masked execution, in float32."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qtale_lightning.evaluation.trace import (
    Text,
    Trace,
    changed_decisions,
    document,
    measure_changes,
    token_pieces,
    trace,
)
from qtale_lightning.models import RoutedForCausalLM, Routing, route
from qtale_lightning.models.sources import load_tokenizer
from qtale_lightning.routing.router import execute_probability
from tests.evaluation.architecture import ARCHITECTURE
from tests.llama import llama_config

THETA = 0.4


def make_model(seed: int) -> RoutedForCausalLM:
    """Four routed layers of five, with random routers whose decisions are mixed."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE)).eval()
    routed = route(copy.deepcopy(model), llama_config(**ARCHITECTURE, router_width=16, start_layer=1))
    torch.manual_seed(seed)
    for layer in routed.model.layers[1:]:
        nn.init.normal_(layer.router.out.weight, 0.0, 2.0)
        nn.init.zeros_(layer.router.out.bias)
    return routed.eval()


@pytest.fixture(scope="module")
def model() -> RoutedForCausalLM:
    return make_model(1)


@pytest.fixture(scope="module")
def other() -> RoutedForCausalLM:
    return make_model(2)


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    """Of 2 to 40 tokens, in no order of length; more than a batch together."""
    generator = torch.Generator().manual_seed(2)
    lengths = [7, 40, 2, 19, *[33] * 70]
    ids = [tuple(torch.randint(0, 97, (n,), generator=generator).tolist()) for n in lengths]
    return [Text("piqa", one, len(one) - 1) for one in ids]


@torch.no_grad()
def alone(model: RoutedForCausalLM, text: Text) -> Trace:
    ids, routing = torch.tensor([text.ids]), Routing(threshold=THETA, execution="masked")
    logits = model(ids, routing=routing, use_cache=False).logits[0]
    nll = nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    probability = execute_probability(routing.stacked_logits())[:, 0].T
    return Trace(probability, routing.stacked_gates()[:, 0].T > 0.5, routing.free[0], nll)


def test_a_trace_is_what_a_text_alone_decides(model: RoutedForCausalLM, texts: list[Text]) -> None:
    traces = trace(model, texts, THETA)
    assert len(traces) == len(texts)
    for text, found in zip(texts[:6], traces, strict=False):
        wanted = alone(model, text)
        # float32 in batches of other shapes: noise of 1e-6, and no p(execute) here is that near θ.
        torch.testing.assert_close(found.probability, wanted.probability, rtol=0, atol=1e-4)
        assert torch.equal(found.executed, wanted.executed)
        assert torch.equal(found.free, wanted.free)
        torch.testing.assert_close(found.nll[1:], wanted.nll, rtol=0, atol=1e-4)
        assert math.isnan(float(found.nll[0]))
    mixed = torch.cat([found.executed[found.free] for found in traces]).double().mean()
    assert 0.2 < float(mixed) < 0.8  # else equality would show little


def test_forced_traces_take_the_others_decisions(
    model: RoutedForCausalLM, other: RoutedForCausalLM, texts: list[Text]
) -> None:
    reference, own = trace(model, texts, THETA), trace(other, texts, THETA)
    forced = trace(other, texts, THETA, forced=reference)
    assert any(bool(changed.any()) for changed in changed_decisions(reference, own))
    assert not any(bool(changed.any()) for changed in changed_decisions(reference, forced))
    # The models differ in their routers alone, so that the same decisions give the same answers.
    for one, same, different in zip(reference, forced, own, strict=True):
        torch.testing.assert_close(one.nll[1:], same.nll[1:], rtol=0, atol=1e-4)
        assert not torch.equal(one.probability, different.probability)


def test_changes_are_counted_among_free_tokens(model: RoutedForCausalLM) -> None:
    """Two texts by hand; reserved tokens differ everywhere, and don't count."""
    free = torch.tensor([False, True, True])
    executed = torch.ones(3, 4, dtype=torch.bool)
    skipping = executed.clone()
    skipping[0] = False  # reserved
    skipping[1, 2] = skipping[1, 3] = False
    half = torch.full((3, 4), 0.75)
    reference = [Trace(half, executed, free, torch.tensor([math.nan, 1.0, 2.0])) for _ in range(2)]
    own = [
        Trace(half, skipping, free, torch.tensor([math.nan, 1.0, 5.0])),
        Trace(half, executed, free, torch.tensor([math.nan, 1.0, 3.0])),
    ]
    texts = [Text("a", (1, 2, 3), 2), Text("b", (4, 5, 6), 1)]
    row = measure_changes(model.config, texts, reference, own, reference)
    assert (row["examples"], row["tokens"]) == (2, 4)
    assert row["decisions_changed"] == pytest.approx(2 / 16)
    assert row["paths_changed"] == pytest.approx(1 / 4)
    assert row["changed_per_layer"] == [None, 0, 0, 0.25, 0.25]
    assert row["execution_ratio"] == pytest.approx((6 * 5 - 6) / (6 * 5))
    assert row["flip_ratio"] == pytest.approx(0.25)
    assert row["paths"]["distinct"] == 2
    # Answers: token 2 of the first text, tokens 1 and 2 of the second.
    assert row["nll"] == pytest.approx((5 + 2) / 2)
    assert row["nll_same_decisions"] == pytest.approx((2 + 1.5) / 2)
    # Differences of 3 and 0.5: their standard deviation 1.7678 over √2.
    assert row["nll_difference_stderr"] == pytest.approx(1.25)


def test_pieces_join_to_the_text_also_where_characters_are_several_tokens() -> None:
    tokenizer = load_tokenizer("tiny", None)
    text = "Question: Was kostet ein Hörnchen? 価格は 5 €\nAnswer: </script>"
    ids = tokenizer(text)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "価" in pieces
    assert "" in pieces


def test_a_document_is_json_that_says_what_was_decided(model: RoutedForCausalLM) -> None:
    tokenizer = load_tokenizer("tiny", None)
    ids = tuple(token % 97 for token in tokenizer("Question: What is a brick made of?")["input_ids"])
    texts = [Text("facts", ids, 5)]
    (found,) = traces = trace(model, texts, THETA)
    content = document(
        "a run", model.config, THETA, tokenizer, texts, [({"bits": 16, "engine": "none"}, traces)]
    )
    content = json.loads(json.dumps(content, allow_nan=False))
    assert (content["layers"], content["start_layer"], content["reserved_tokens"]) == (5, 1, 2)
    (text,) = content["texts"]
    assert len(text["tokens"]) == len(ids)
    (kept,) = text["traces"]
    assert kept["executed"] == ["".join("1" if e else "0" for e in row) for row in found.executed.tolist()]
    for token, row in enumerate(kept["probability"]):
        assert [p / 1000 for p in row] == pytest.approx(found.probability[token].tolist(), abs=5.1e-4)
    assert kept["nll"][0] is None
    assert kept["nll"][1:] == pytest.approx(found.nll[1:].tolist(), abs=5.1e-4)
