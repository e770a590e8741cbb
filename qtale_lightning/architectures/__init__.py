"""Model families: one file each says what the suite needs to know of one, and nothing else names a family."""

import json
from pathlib import Path
from typing import Any

from qtale_lightning.architectures.base import (
    Architecture,
    KnownModel,
    ScaleMapping,
    head_width,
    window,
)
from qtale_lightning.architectures.gemma3 import GEMMA3
from qtale_lightning.architectures.llama import LLAMA
from qtale_lightning.architectures.mistral import MISTRAL
from qtale_lightning.architectures.qwen2 import QWEN2
from qtale_lightning.architectures.qwen3 import QWEN3

__all__ = [
    "ARCHITECTURES",
    "ROUTED",
    "Architecture",
    "KnownModel",
    "ScaleMapping",
    "architecture_of",
    "head_width",
    "known_model",
    "known_models",
    "planned_config",
    "register",
    "unit_shares",
    "window",
]

ARCHITECTURES: dict[str, Architecture] = {}
"""By Hugging Face's `model_type`."""

ROUTED = "routed_"
"""What `model_type` of a model with routers begins with."""


def register(architecture: Architecture) -> Architecture:
    """Make a family known, and its models by their names.

    Raises:
        ValueError: One of its models has the name of another family's.
    """
    others = {k: v for k, v in ARCHITECTURES.items() if k != architecture.model_type}
    taken = {name for other in others.values() for name in other.models} & architecture.models.keys()
    if taken:
        raise ValueError(f"{architecture.model_type}: the model {min(taken)!r} is another family's")
    ARCHITECTURES[architecture.model_type] = architecture
    return architecture


for _family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3):
    register(_family)


def architecture_of(config: Any) -> Architecture:
    """The family of a configuration, or of a model's name of its type; with routers or without.

    Raises:
        ValueError: It is none that is declared; the message lists those.
    """
    model_type = config if isinstance(config, str) else getattr(config, "model_type", None)
    known = ARCHITECTURES.get(str(model_type).removeprefix(ROUTED))
    if known is None:
        raise ValueError(
            f"models of type {model_type!r} aren't known: {', '.join(ARCHITECTURES)} are "
            "(qtale_lightning/architectures declares one in a file)"
        )
    return known


def unit_shares(config: Any) -> tuple[float, ...]:
    """What routers decide about in a layer, its units, as they are computed: by their shares of its linears' weights.

    (1.0,) is the layer as a whole. There are two, attention and MLP, where ``gates`` of the configuration says so.
    Execution ratios weigh units by these shares: one of 0.8 computes 0.8 of the weights, whatever the units are.
    """
    if getattr(config, "gates", "layer") == "layer":
        return (1.0,)
    weights = architecture_of(config).sublayers(config).values()
    return tuple(weight / sum(weights) for weight in weights)


def known_models() -> dict[str, tuple[Architecture, KnownModel]]:
    """All models that are known by name, with their families."""
    return {
        name: (family, model) for family in ARCHITECTURES.values() for name, model in family.models.items()
    }


def known_model(name: str) -> tuple[Architecture, KnownModel]:
    """The model of a name, with its family.

    Raises:
        ValueError: An unknown name; the known ones are listed.
    """
    known = known_models()
    if name not in known:
        raise ValueError(f"unknown model {name!r} (--model.name): choose one of {', '.join(known)}")
    return known[name]


def planned_config(name: str, path: str | None = None) -> dict[str, Any]:
    """A model's configuration, with the embeddings of the folder that holds its weights, if that is one.

    Many fine-tunes have a padding token more. All else must agree: where the folder is loaded from, that is checked.
    """
    family, model = known_model(name)
    known = {"model_type": family.model_type, "tie_word_embeddings": False, **model.config}
    config = Path(path or "", "config.json")
    if path is None or not config.is_file():
        return known
    try:
        own = json.loads(config.read_text(encoding="utf-8"))
        return known | {key: own[key] for key in ("vocab_size", "tie_word_embeddings") if key in own}
    except (ValueError, TypeError):  # said where it is loaded from
        return known
