"""QTALE: token-adaptive layer execution that survives weight quantization, as a PyTorch Lightning suite.

Importing the package registers the routed LLaMA and its packed weights with transformers, so that
``AutoModelForCausalLM.from_pretrained("<run>/model")`` loads an exported run.
"""

import sys
from typing import TYPE_CHECKING

from qtale_lightning.lazy import lazily

if TYPE_CHECKING:
    from qtale_lightning.models import RoutedConfig, RoutedForCausalLM, Routing

__version__ = "0.1.0"

__all__ = ["RoutedConfig", "RoutedForCausalLM", "Routing", "__version__"]

__getattr__ = lazily(__name__, {f"{__name__}.models": ["RoutedConfig", "RoutedForCausalLM", "Routing"]})


def _runs_as_command() -> bool:
    """Whether this import is Python's own on the way to ``python -m qtale_lightning…``.

    While it looks for the module, ``sys.argv[0]`` is "-m" (documented with the option). The command line imports what
    its command needs, which for most is neither transformers nor PyTorch: registering takes seconds.
    """
    started = sys.orig_argv
    named = started[started.index("-m") + 1] if "-m" in started[:-1] else ""
    return sys.argv[:1] == ["-m"] and named.split(".")[0] == __name__


if not _runs_as_command():
    import qtale_lightning.models.families
    import qtale_lightning.quantization.checkpoint  # noqa: F401
