"""Loading a base model or its tokenizer from a folder, the hub or a package."""

from importlib.resources import files

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from qtale_lightning.architectures import known_model
from qtale_lightning.models.config import RoutedConfig
from qtale_lightning.models.families import classes_of, plain_config
from qtale_lightning.models.locations import (
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    ModelUnavailableError,
    find_commit,
    known_commit,
    locate,
    source_name,
)

__all__ = [
    "ModelUnavailableError",
    "check_source",
    "check_tokens",
    "find_commit",
    "known_commit",
    "load_base",
    "load_tokenizer",
    "source_name",
]

# What must agree between a known model and the weights that a path holds. The vocabulary is the folder's own: many
# fine-tunes have a padding token more.
_SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def base_config(name: str, layers: int | None = None) -> PreTrainedConfig:
    """The configuration of a model that is known by name, without touching weights or network.

    Args:
        layers: As many instead of its own.
    """
    family, model = known_model(name)
    shape = {**model.config} | ({} if layers is None else {"num_hidden_layers": layers})
    return classes_of(family.model_type).plain.config_class(**shape)


def load_tokenizer(
    name: str, path: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        HubError: It can't be had; the message says what to do.
        ModelUnavailableError, ValueError: as :func:`load_base`.
    """
    source = locate(name, path, revision)
    if source is None:
        tokenizer_file = files("qtale_lightning.models") / "tiny" / "tokenizer.json"
        return PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer_file), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        )
    folder = source.get(*CONFIG, *TOKENIZER)
    with source.loading():
        tokenizer = AutoTokenizer.from_pretrained(folder, **source.options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    name: str,
    path: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    revision: str | None = None,
) -> PreTrainedModel:
    """The pretrained model, dense; ``tiny`` is initialised at random from ``seed``.

    Args:
        name: One of `architectures`.
        path: A folder or hub id to take it from, instead of the model's own source.
        dtype: Of the weights.
        seed: Of random weights.
        revision: Commit, branch or tag of the hub's repository; None is the model's commit, or main with a path.

    Raises:
        HubError: It can't be had; the message says what to do.
        ModelUnavailableError: There is no such folder, or no model in it.
        ValueError: An unknown model, or a path that holds a model of other sizes or another family.
    """
    source = locate(name, path, revision)
    if source is None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = classes_of(base_config(name)).plain(base_config(name))
        for weight in model.parameters():  # no buffers: as `from_pretrained`, which keeps frequencies exact
            weight.data = weight.data.to(dtype)
        return model
    options = source.options
    if source.gguf:
        # Otherwise transformers keeps GGUF's own packed blocks, which nothing can be trained or quantized from.
        options["quantization_config"] = GgufConfig(dequantize=True)
    config = check_source(name, path, revision)
    if not source.gguf:
        options["config"] = config
    folder = source.get(*CONFIG, *WEIGHTS)
    if not source.gguf and not [*folder.glob("*.safetensors")]:
        raise ModelUnavailableError(
            f"{source} (--model.path) has no weights in the safetensors format, and pickled ones aren't loaded: save "
            "the model again with transformers (model.save_pretrained), and give that folder"
        )
    with source.loading():
        plain = classes_of(base_config(name)).plain
        model = plain.from_pretrained(folder, dtype=dtype, **options)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    return model


def check_source(name: str, path: str | None = None, revision: str | None = None) -> PreTrainedConfig:
    """Refuse a model that can't be reached, is another one or quantized, by its configuration alone; and return that.

    Raises:
        ModelUnavailableError: It can't be reached; the message says what to do.
        ValueError: It can't be trained as the model of this name.
    """
    expected = base_config(name)
    source = locate(name, path, revision)
    if source is None or source.gguf:
        return expected
    folder = source.get(*CONFIG)
    with source.loading():
        config = AutoConfig.from_pretrained(folder, **source.options)
    if isinstance(config, RoutedConfig):
        if config.method != "full":
            raise ValueError(
                f"{source} (--model.path) holds a model of the method {config.method}, which skips or drops layers: "
                "give what it was trained from, or the exported model of a run of the method full"
            )
        config = plain_config(config)
    if config.model_type != expected.model_type:
        raise ValueError(
            f"{source} (--model.path) holds a {config.model_type!r} model, but {name} is of the family "
            f"{expected.model_type!r}: choose the --model.name that it is"
        )
    wrong = [
        f"{key} {getattr(config, key, None)} instead of {getattr(expected, key, None)}"
        for key in _SHAPE
        if getattr(config, key, None) != getattr(expected, key, None)
    ]
    if wrong:
        raise ValueError(
            f"{source} (--model.path) isn't a {name}: {', '.join(wrong)}. Choose the --model.name that it is."
        )
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        raise ValueError(
            f"{source} (--model.path) is quantized already ({method or 'by an unnamed method'}): LoRA is "
            "merged into full-precision weights, which are quantized afterwards. Give the model that it was made from."
        )
    return config


def check_tokens(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, name: str) -> None:
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
