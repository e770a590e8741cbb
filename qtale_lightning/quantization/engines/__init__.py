"""The quantization engines by name, the default one first: every file beside this one declares one."""

from importlib import import_module
from pkgutil import iter_modules

from qtale_lightning.quantization.engines.base import Engine

__all__ = ["DEFAULT", "ENGINES", "Engine", "find", "register"]

ENGINES: dict[str, Engine] = {}


def register(engine: Engine) -> None:
    """Adds an engine to those that can be chosen.

    Raises:
        ValueError: Another one has its name, or its name in files.
    """
    for other in ENGINES.values():
        if engine.name == other.name or folder(engine) == folder(other):
            raise ValueError(f"there is an engine {other.name}, with files {folder(other)}-…, already")
    ENGINES[engine.name] = engine


def folder(engine: Engine) -> str:
    """An engine's name in a run's files."""
    return engine.folder or engine.name


def find(name: str) -> Engine:
    """The engine of a name.

    Raises:
        ValueError: There is none; the message names those that there are.
    """
    if name not in ENGINES:
        raise ValueError(f"{name!r}: choose one of {', '.join(ENGINES)}")
    return ENGINES[name]


_declared = [
    import_module(f"{__name__}.{module.name}").ENGINE
    for module in iter_modules(__path__)
    if module.name != "base"
]
for _engine in sorted(_declared, key=lambda engine: (not engine.default, engine.name)):
    register(_engine)

DEFAULT = next(iter(ENGINES))
"""The engine that is taken where none is named."""
