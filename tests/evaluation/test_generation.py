"""Written answers against token-by-token masked passes, and what is read from them."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qtale_lightning.evaluation.generation import generate, read_answer
from qtale_lightning.models import RoutedForCausalLM, Routing, route
from tests.evaluation.architecture import ARCHITECTURE
from tests.llama import llama_config

MODEL = ARCHITECTURE | {"max_position_embeddings": 64}
NEW = 9


def words(eos: int) -> PreTrainedTokenizerFast:
    """Token n is the word "wn", and one of them is EOS; there is no padding token."""
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=f"w{eos}")


@pytest.fixture
def model() -> RoutedForCausalLM:
    """Random weights, and routers whose decisions are mixed; two tokens are reserved."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**MODEL))
    routed = route(copy.deepcopy(dense), llama_config(**MODEL, router_width=16, start_layer=1))
    for layer in routed.model.layers[1:]:
        nn.init.normal_(layer.router.out.weight, 0.0, 2.0)
        nn.init.zeros_(layer.router.out.bias)
    return routed.eval()


@pytest.fixture
def prompts() -> list[list[int]]:
    """Of 1 to 23 tokens: some shorter than what is reserved."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 97, (n,), generator=generator).tolist() for n in (5, 1, 23, 2, 11, 17, 5, 8)]


@torch.inference_mode()
def one_by_one(model: RoutedForCausalLM, prompt: list[int], theta: float, eos: int = 96) -> str:
    """Greedy decoding by masked passes over the whole sequence: no cache, no batch, no `generate()`."""
    ids = list(prompt)
    for _ in range(NEW):
        routing = Routing(threshold=theta, execution="masked")
        logits = model(torch.tensor([ids]), routing=routing, use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == eos:
            break
    return " ".join(f"w{n}" for n in ids[len(prompt) :] if n != eos)


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
@pytest.mark.parametrize("theta", [0.0, 0.3, 0.5, 1.0])
def test_batches_write_what_prompts_alone_do(
    model: RoutedForCausalLM, prompts: list[list[int]], theta: float, batch_tokens: int
) -> None:
    finished: list[int] = []
    texts = generate(
        model, words(eos=96), prompts, NEW, theta, batch_tokens=batch_tokens, on_progress=finished.append
    )
    assert texts == [one_by_one(model, prompt, theta) for prompt in prompts]
    assert sum(finished) == len(prompts)
    assert (len(finished) == 1) == (batch_tokens == 10_000)
    assert len(set(texts)) > 4


def test_the_threshold_matters(model: RoutedForCausalLM, prompts: list[list[int]]) -> None:
    dense, routed = (generate(model, words(eos=96), prompts, NEW, theta) for theta in (0.0, 0.5))
    assert dense != routed
    model.config.threshold = 0.0
    assert generate(model, words(eos=96), prompts, NEW) == dense


def test_a_text_ends_at_eos(model: RoutedForCausalLM, prompts: list[list[int]]) -> None:
    """EOS is a token that the third prompt's text has in its middle; the others go on to their own ends."""
    free = generate(model, words(eos=96), prompts, NEW, 0.5)
    eos = int(free[2].split()[4].removeprefix("w"))
    texts = generate(model, words(eos), prompts, NEW, 0.5)
    assert texts == [one_by_one(model, prompt, 0.5, eos) for prompt in prompts]
    assert len(texts[2].split()) <= 4
    assert max(len(text.split()) for text in texts) == NEW


def test_a_models_own_sampling_settings_are_left_aside(
    model: RoutedForCausalLM, prompts: list[list[int]]
) -> None:
    expected = generate(model, words(eos=96), prompts, NEW, 0.5)
    model.generation_config.update(do_sample=True, temperature=1.5, repetition_penalty=1.9, max_length=3)
    own = model.generation_config
    assert generate(model, words(eos=96), prompts, NEW, 0.5) == expected
    assert model.generation_config is own


def test_what_is_longer_than_the_context_is_refused(model: RoutedForCausalLM) -> None:
    assert generate(model, words(eos=96), [[1] * 60], 4)
    with pytest.raises(
        ValueError, match=r"take 65 tokens, and the model's context has 64.*--data\.max_new_tokens"
    ):
        generate(model, words(eos=96), [[1] * 60], 5)


def test_nothing_to_write(model: RoutedForCausalLM) -> None:
    assert generate(model, words(eos=96), [], 5) == []


LETTERS = ("A", "B", "C", "D")
CHOICES = ("iron", "a soft metal", "Wood.", "wool")


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("B", 1),
        ("  D\nQuestion: what else?", 3),
        ("(C)", 2),
        ("(C) Wood.", 2),
        ("B.", 1),
        ("B. a soft metal", 1),
        ("B) whatever follows", 1),
        ("A: iron", 0),
        ("wool", 3),
        ("Wool.", 3),
        ("WOOD", 2),
        ("a soft metal.", 1),
        # what is no answer
        ("", None),
        ("\n\n", None),
        ("E", None),
        ("b", None),  # labels are written as they are shown
        ("A soft", None),  # an article, not a label
        ("A wool", None),
        ("AB", None),
        ("A.5", None),
        ("The answer is B", None),
        ("iron or wool", None),
        ("I think it is\nB", None),
        ("(B", None),
    ],
)
def test_reading_letters(text: str, read: int | None) -> None:
    assert read_answer(text, LETTERS, CHOICES) == read


@pytest.mark.parametrize(
    ("text", "read"),
    [("2", 1), ("(1)", 0), ("2. 3", 1), ("7", 2), ("2.5", None), ("0", None), ("-1", None), ("12", None)],
)
def test_reading_numbers(text: str, read: int | None) -> None:
    """A label goes before a text: "2" is the second choice, and not the first, which is the number 2."""
    assert read_answer(text, ("1", "2", "3"), ("2", "3", "7")) == read


def test_a_text_of_two_choices_is_none() -> None:
    assert read_answer("iron", LETTERS, ("iron", "Iron.", "wood", "wool")) is None


@pytest.mark.parametrize(
    ("text", "read"), [("Wool.", 3), ("wood\nor wool", 2), ("A", None), ("wood wool", None)]
)
def test_reading_choices_that_the_prompt_doesnt_list(text: str, read: int | None) -> None:
    assert read_answer(text, (), CHOICES) == read
