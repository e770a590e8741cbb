"""Loading what a run has exported: whole and as it was written, or with a message that names the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import qtale_lightning.models.families  # noqa: F401  # registers routed models with transformers
from qtale_lightning.manifest import DamagedFileError, parse_object, verify
from qtale_lightning.models.modeling import RoutedForCausalLM
from qtale_lightning.run import RunDirectory

# What a model's folder holds as JSON, and keys that each must have.
_PARTS: dict[str, tuple[str, ...]] = {
    "config.json": ("model_type",),
    "generation_config.json": ("transformers_version",),
    "tokenizer.json": ("model",),
    "tokenizer_config.json": ("tokenizer_class",),
    "model.safetensors.index.json": ("weight_map",),
}


def load_model(run: RunDirectory, folder: Path, dtype: Any, bits: int | None = None) -> RoutedForCausalLM:
    """A model of the run, from its folder.

    Args:
        dtype: As `from_pretrained` takes it.
        bits: Of the precisions that the folder holds, where it holds several.

    Raises:
        DamagedFileError: A file of it isn't what the run wrote, or can't be read; the message names it.
        ValueError: Its weights don't match its configuration, or it doesn't hold that precision.
    """
    check_folder(run, folder)
    with _naming(run, folder):
        return RoutedForCausalLM.from_pretrained(folder, dtype=dtype, bits=bits)


def load_tokenizer(run: RunDirectory, folder: Path) -> PreTrainedTokenizerBase:
    """A model's tokenizer, from its folder.

    Raises:
        DamagedFileError: as `load_model`.
    """
    check_folder(run, folder)
    with _naming(run, folder):
        return AutoTokenizer.from_pretrained(folder)


def check_folder(run: RunDirectory, folder: Path) -> None:
    """Refuse a model's folder of which a file isn't whole, as far as can be told without loading it.

    Raises:
        DamagedFileError: The message names the file.
    """
    remedy = run.remedy(folder)
    verify(run.root, folder, remedy)
    for name, keys in _PARTS.items():
        if name == "config.json" or (folder / name).is_file():
            if not (folder / name).is_file():
                raise DamagedFileError(f"{folder / name} is missing: {remedy}")
            parse_object(folder / name, remedy, keys)
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise DamagedFileError(f"{file} isn't whole ({error}): {remedy}") from error


@contextmanager
def _naming(run: RunDirectory, folder: Path) -> Iterator[None]:
    """Names the folder in libraries' errors about what they read there, of many types."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, OSError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        raise DamagedFileError(f"{folder} can't be loaded ({reason}): {run.remedy(folder)}") from error
