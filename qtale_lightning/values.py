"""Values of options: lists and paths as people write them, and numbers in ranges, which NaN is never in."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import signature
from os.path import expanduser
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from jsonargparse import Namespace
from jsonargparse.typing import (
    PositiveInt,
    register_type,
    restricted_number_type,
)

Item = TypeVar("Item")


class Numbers(tuple[Item, ...]):
    """Numbers of an option: ``[4, 3]``, ``4,3`` or one alone, on the command line as in YAML; whole ones stay whole."""

    @staticmethod
    def read(value: Any) -> "Numbers[int | float]":
        """From what was written (ValueError)."""
        return Numbers(map(_number, _items(value)))


class Floats(tuple[Item, ...]):
    """As `Numbers`, none of them whole: what is written as 0 is read as 0.0, and named so in files."""

    @staticmethod
    def read(value: Any) -> "Floats[float]":
        """From what was written (ValueError)."""
        return Floats(map(float, Numbers.read(value)))


class Names(tuple[Item, ...]):
    """Names of an option: ``[q_proj, v_proj]``, ``q_proj,v_proj`` or one alone, on the command line as in YAML."""

    @staticmethod
    def read(value: Any) -> "Names[str]":
        """From what was written (ValueError)."""
        names: Names[str] = Names(_items(value))
        if wrong := [name for name in names if not isinstance(name, str) or not name]:
            raise ValueError(f"{wrong[0]!r} is no name: give names such as [a,b]")
        return names


class UserPath(str):
    """A path (or the id of something on the hub) whose ``~`` is expanded, wherever it was written."""

    @staticmethod
    def read(value: Any) -> "UserPath":
        """From what was written (ValueError)."""
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is no path: put it in quotes")
        return UserPath(expanduser(value))


class BatchSize(str):
    """Requests in a batch, as lm-evaluation-harness takes it: a number, ``auto`` or ``auto:N``."""

    @staticmethod
    def read(value: Any) -> "BatchSize":
        """From what was written (ValueError)."""
        if not re.fullmatch(r"(auto:)?[1-9]\d*|auto", str(value)):
            raise ValueError("give a number of requests, auto or auto:N")
        return BatchSize(value)


register_type(Numbers, list, Numbers.read)
register_type(Floats, list, Floats.read)
register_type(Names, list, Names.read)
register_type(UserPath, str, UserPath.read)
register_type(BatchSize, str, BatchSize.read)

# jsonargparse's own PositiveFloat and NonNegativeFloat take infinity.
if TYPE_CHECKING:
    Positive = float
    NonNegative = float
    ShareBelowOne = float
    ShareAboveZero = float
    CodeBits = int
    Bits = int | float
else:
    Positive = restricted_number_type("Positive", float, [(">", 0), ("<", math.inf)])
    NonNegative = restricted_number_type("NonNegative", float, [(">=", 0), ("<", math.inf)])
    ShareBelowOne = restricted_number_type("ShareBelowOne", float, [(">=", 0), ("<", 1)])
    ShareAboveZero = restricted_number_type("ShareAboveZero", float, [(">", 0), ("<=", 1)])
    CodeBits = restricted_number_type("CodeBits", int, [(">=", 2), ("<=", 8)])
    # A precision: whole where it is.
    Bits = PositiveInt | Positive


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, str):
        text = value.strip().removeprefix("[").removesuffix("]").strip()
        return [part.strip() for part in text.split(",")] if text else []
    if isinstance(value, list | tuple):
        return value
    if value is None or isinstance(value, dict):
        raise ValueError("give a list such as [a,b], or one value")
    return [value]


def _number(value: Any) -> int | float:
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is no number: give numbers such as [4,3], or one alone")
    return value


def in_range(section: str, declared: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Refuse numbers outside of the ranges that a signature's types declare, whoever gives them.

    Args:
        section: Of the options, such as ``model``; empty for a command's own.
        declared: A function whose parameters have jsonargparse's types: ``PositiveInt | None``, or
            ``Floats[ClosedUnitInterval]`` for a list of them.
        values: Of its parameters, by name.

    Raises:
        ValueError: The message names the option, its value and its range.
    """
    for name, kind in get_type_hints(declared).items():
        option = f"--{section}.{name}" if section else f"--{name}"
        ranges = [one for one in _parts(kind) if hasattr(one, "_restrictions")]
        given = values.get(name)
        for value in given if isinstance(given, tuple | list) else () if given is None else (given,):
            refusals = [_refusal(one, value) for one in ranges]
            if ranges and all(refusals):
                raise ValueError(f"{option} {value}: {refusals[0]}")


def _parts(kind: Any) -> list[Any]:
    """A type, and all that it is made of."""
    return [kind, *(part for argument in get_args(kind) for part in _parts(argument))]


def _refusal(ranged: Callable[[Any], Any], value: Any) -> str:
    try:
        ranged(value)
    except ValueError as error:
        return range_in_words(str(error))
    return ""


def range_in_words(text: str) -> str:
    """A refusal of jsonargparse's types in words; other texts as they are."""
    bounds = re.search(r"does not conform to restriction (.*)", text)
    return (
        text
        if bounds is None
        else "must be " + re.sub(r"v([<>]=?)", r"\1 ", bounds[1]).replace("inf", "infinity")
    )


def ranged(section: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates an ``__init__`` whose types declare ranges: it refuses numbers outside of them, as `in_range` does.

    It is given plain ones, though the parser makes them of those types: a checkpoint with others isn't read again.
    """

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        @wraps(init)
        def checked(*args: Any, **given: Any) -> None:
            bound = signature(init).bind(*args, **given)
            in_range(section, init, bound.arguments)
            bound.arguments |= {name: _plain(value) for name, value in bound.arguments.items()}
            init(*bound.args, **bound.kwargs)

        return checked

    return decorate


def plain_numbers(config: Namespace) -> Namespace:
    """A parsed configuration whose numbers are int and float, not of the types that declare their ranges."""
    for name, value in config.items():
        config[name] = _plain(value)
    return config


def _plain(value: Any) -> Any:
    kind = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
    return value if kind in (bool, None) else kind(value)
