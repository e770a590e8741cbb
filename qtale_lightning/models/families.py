"""The routed model of each declared family, known to transformers by its name: ``routed_llama`` and its like."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from qtale_lightning.architectures import ARCHITECTURES, ROUTED, architecture_of
from qtale_lightning.models.config import RoutedConfig
from qtale_lightning.models.modeling import RoutedForCausalLM, RoutedModel


@dataclass(frozen=True)
class Classes:
    """A family's classes: its own with a language-model head, and those with routers.

    Each of the latter is made of one of ours and of the family's own, in that order.
    """

    plain: Any
    config: type[RoutedConfig]
    causal_lm: type[RoutedForCausalLM]


def classes_of(config: Any) -> Classes:
    """The classes of a configuration's family, or of that of a `model_type` (ValueError: it isn't declared)."""
    return _classes(architecture_of(config).model_type)


def route(model: Any, config: RoutedConfig) -> RoutedForCausalLM:
    """Attach routers to a family's causal language model in place, and return it as a routed model.

    Weights keep their names and storage.
    """
    model.__class__ = classes_of(config).causal_lm
    model.attach(config)
    return model


def routed_config(base: PreTrainedConfig, **routing: Any) -> RoutedConfig:
    """A family's configuration with routers.

    Args:
        base: The family's own.
        routing: Fields of :class:`RoutedConfig`.
    """
    classes = classes_of(base)
    return classes.config(**{**base.to_dict(), "model_type": classes.config.model_type, **routing})


def plain_config(config: RoutedConfig) -> PreTrainedConfig:
    """The family's own configuration of a model all of whose layers always execute: what its weights are without us."""
    plain = classes_of(config).plain.config_class
    own = {key: value for key, value in config.to_dict().items() if key not in RoutedConfig.__annotations__}
    return plain(**own | {"model_type": plain.model_type, "architectures": None})


@cache
def _classes(model_type: str) -> Classes:
    """Made once, and made known to transformers' Auto classes."""
    plain: Any = getattr(transformers, ARCHITECTURES[model_type].causal_lm)
    fields = RoutedConfig.__annotations__
    config: Any = strict(
        _class(
            (RoutedConfig, plain.config_class),
            __annotations__=dict(fields),
            model_type=ROUTED + model_type,
            **{name: getattr(RoutedConfig, name) for name in fields},
        )
    )
    layers: Any = transformers.AutoModel._model_mapping[plain.config_class]
    stack = _class((RoutedModel, layers), config_class=config)
    split = [f"Routed{name}" for name in plain._no_split_modules]
    causal_lm = _class((RoutedForCausalLM, plain), config_class=config, stack=stack, _no_split_modules=split)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
    return Classes(plain, config, causal_lm)


def _class(bases: tuple[type, type], **namespace: Any) -> Any:
    """A class of one of ours and of a family's own, found in this module by its name, as pickle looks for it."""
    name = f"Routed{bases[1].__name__}"
    made = type(name, bases, {"__module__": __name__, "__doc__": bases[0].__doc__, **namespace})
    globals()[name] = made
    return made


for _model_type in ARCHITECTURES:
    _classes(_model_type)
