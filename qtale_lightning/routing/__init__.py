"""Methods of layer routing, one file each in ``methods/``: what varies between them, and nothing else.

Importing this needs no PyTorch: what a plan or a table asks of a method are its attributes.
"""

from importlib import import_module
from pkgutil import iter_modules

from qtale_lightning.routing import methods
from qtale_lightning.routing.method import Budget, Method, Rows

__all__ = ["METHODS", "Budget", "Method", "Rows", "method_of", "register"]

METHODS: dict[str, Method] = {}
"""All methods, by name."""


def register(method: Method) -> None:
    """Make a method known by its name: all that one in a file of its own elsewhere has to do."""
    METHODS[method.name] = method


def method_of(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: There is none; the message names those that are.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r} (--model.method): choose one of {', '.join(METHODS)}")
    return METHODS[name]


for _module in iter_modules(methods.__path__, f"{methods.__name__}."):
    register(import_module(_module.name).METHOD)
