"""Saving, loading and refusing routed models."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qtale_lightning
from qtale_lightning import RoutedForCausalLM
from tests.llama import llama_config

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make(**options: object) -> RoutedForCausalLM:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(llama_config(**SIZES, router_width=8, **options)).eval()


def test_export_and_reload_give_the_same_logits(tmp_path: Path) -> None:
    model, ids = make(threshold=0.3, reserved_tokens=1), torch.arange(12).view(2, 6)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, qtale_lightning.RoutedForCausalLM)
    assert again.config.threshold == 0.3
    assert again.config.reserved_tokens == 1
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_checkpoint_keys_are_hugging_faces_and_the_routers(tmp_path: Path) -> None:
    keys = set(make().state_dict())
    routers = {key for key in keys if ".router." in key}
    assert {key.split(".")[2] for key in routers} == {"2", "3"}
    assert "model.layers.3.self_attn.q_proj.weight" in keys - routers


def test_routers_stay_in_float32(tmp_path: Path) -> None:
    make().to(torch.bfloat16).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert {p.dtype for n, p in again.named_parameters() if ".router." in n} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start_layer": 1}, "missing"),
        ({"start_layer": 3}, "left over"),
        ({"router_width": 16}, "router_width 16.*misshaped"),
    ],
)
def test_weights_that_do_not_match_the_routing_configuration_are_refused(
    tmp_path: Path, change: dict[str, int], message: str
) -> None:
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_lost_router_is_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.2.router.out.bias")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"don't match its config.json.*router.out.bias"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.2}, "threshold 1.2"),
        ({"start_layer": 9}, "start_layer 9"),
        ({"reserved_tokens": 0}, "reserved"),
    ],
)
def test_impossible_configurations_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(Exception, match=message):  # huggingface_hub wraps a validator's ValueError
        llama_config(**SIZES, **options)
